"""A training run on shapes alone: what a step holds in memory, without its weights and without computing anything.

torch's fake tensors have a shape, a dtype and a device and no values. A program that runs on them makes the very
tensors that it would make, at the same moments; summing up what is alive gives the peak of the allocator to the byte.
What a kernel needs within itself is not seen.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.file import held
from svdpeft.decomposition import uncached
from svdpeft.finetuning.session import call, loss

ITEM, NONZERO = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default
EQUAL, FINITE = torch.ops.aten.equal.default, (torch.isfinite, Tensor.isfinite)
SHORT = 16  # tokens: of a text that is run in the place of a longer one
STATES = {"adamw": (2, 0), "adamw-8bit": (0, 2), "sgd": (0, 0)}  # per value that trains: others like it, and bytes


@contextmanager
def shapes_only() -> Iterator[FakeTensorMode]:
    """Within the block tensors have no values; where a program asks for one it is 1, 0 or False, and finite.

    Nothing of it stays: an open ``svd_cache`` is neither read nor written.

    Yields:
        The mode, whose ``from_tensor`` gives the shape of a real tensor.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _Answers(), _Finite(), uncached():
        yield mode


class _Finite(TorchFunctionMode):
    """Values that are not there are finite."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.tensor(True) if func in FINITE else func(*args, **(kwargs or {}))


class _Answers(TorchDispatchMode):
    """What a program does with values decides no shape of ours: a seed, a warning, a cluster that came out empty."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ITEM:
            if args[0].constant is not None:
                return args[0].constant.item()
            return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 0
        if func is NONZERO:
            return args[0].new_empty((0, args[0].ndim), dtype=torch.long)
        return True if func is EQUAL else func(*args, **(kwargs or {}))


class Alive(TorchDispatchMode):
    """Sums up the bytes of all tensors that are alive, and remembers the most of them at a time.

    Args:
        seconds: after which it gives up.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        super().__init__()
        self._seconds, self._end = seconds, time.monotonic() + seconds
        self.now = self.peak = self.calls = 0
        self._known: set[int] = set()

    def count(self, *tensors: Tensor) -> int:
        """Count tensors that are there already, each memory once; return how many bytes are new."""
        before = self.now
        for tensor in tensors:
            self._add(tensor.untyped_storage())
        return self.now - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.monotonic() > self._end:
            raise TimeoutError(f"it has too many calls for {self._seconds:.0f} s")
        self.calls += 1
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Untraceable(ValueError):
    """A model that asks for values, or has too many calls in a step."""


@dataclass(frozen=True)
class StepMemory:
    """What a training holds at the worst moment of a step, in bytes.

    Args:
        weights: of the model, its buffers among them.
        adapter: the factors of all sites.
        optimizer: what it keeps.
        step: activations, gradients and what passes by.
        tokens: of the text that was run, where it was cut short; the rest of ``step`` grows as it did up to there.
    """

    weights: int
    adapter: int
    optimizer: int
    step: int
    tokens: int | None = None

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.optimizer + self.step

    def __str__(self) -> str:
        parts = {"weights": self.weights, "adapter": self.adapter, "optimizer": self.optimizer, "step": self.step}
        cut = "" if self.tokens is None else f" (token by token: run on {self.tokens}, and grown on from there)"
        return " + ".join(f"{name} {size_of(part)}" for name, part in parts.items()) + f" = {size_of(self.total)}{cut}"


def size_of(count: float) -> str:
    """Bytes as people read them.

    Example:
        >>> size_of(7 * 2**30)
        '7.0 GiB'
    """
    unit = next((power for power in (3, 2) if count >= 2 ** (10 * power)), 1)
    return f"{count / 2 ** (10 * unit):,.1f} {('KiB', 'MiB', 'GiB')[unit - 1]}"


def trace_step(
    mode: FakeTensorMode,
    adapter: Adapter,
    batch: Mapping[str, Tensor],
    accumulate: int = 1,
    mixed_precision: str | None = None,
    optimizer: str = "adamw",
    seconds: float = math.inf,
) -> StepMemory:
    """Return what one training step holds at its peak.

    Nothing is computed, and the model keeps its values, its gradients and its modes. A model that goes through a text
    token by token (RWKV-4 and 7 without their kernels) makes as many calls again for each: two short texts are run, of
    which the longer is ``StepMemory.tokens`` long, and every further token is taken to hold as much as theirs.

    Args:
        mode: of the block of ``shapes_only`` in which this is called.
        adapter: attached in the block, or before it.
        batch: of one forward on one device, as the model takes it; its values do not matter.
        accumulate: forwards per optimizer step; beyond one, gradients are there from the start.
        mixed_precision: ``"bf16"`` or ``"fp16"`` autocast.
        optimizer: one of ``STATES``.
        seconds: that each run may take.

    Raises:
        Untraceable: the model does not run so, or it has taken longer.
    """
    trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    likes, more = STATES[optimizer]
    states = sum(parameter.numel() * (likes * parameter.element_size() + more) for parameter in trained)
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision or "")

    def run(shown: Mapping[str, Tensor], backward: bool = True) -> tuple[StepMemory, int]:
        with _emptied(adapter, trained):
            alive = Alive(seconds)
            shapes = [mode.from_tensor(tensor) for tensor in [*adapter.model.parameters(), *adapter.model.buffers()]]
            factors = [mode.from_tensor(t) for tensors, _ in held(adapter.sites).values() for t in tensors.values()]
            ours, weights = alive.count(*factors), alive.count(*shapes)
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter) if accumulate > 1 else None
            alive.count(*(parameter.grad for parameter in trained if parameter.grad is not None))
            with alive:
                _step(adapter, {name: mode.from_tensor(value) for name, value in shown.items()}, low, backward)
            return StepMemory(weights, ours, states, alive.peak - ours - weights), alive.calls

    length = batch["input_ids"].shape[1] if "input_ids" in batch else 0
    if length <= 2 * SHORT:
        return run(batch)[0]
    half, more = (run(_cut(batch, tokens), backward=False)[1] for tokens in (SHORT // 2, SHORT))
    if more - half < SHORT // 2:  # not a call for each further token
        return run(batch)[0]
    (short, _), (twice, _) = run(_cut(batch, SHORT)), run(_cut(batch, 2 * SHORT))
    further = (twice.step - short.step) * (length - 2 * SHORT) // SHORT
    return replace(twice, step=twice.step + further, tokens=2 * SHORT)


def _step(adapter: Adapter, shown: Mapping[str, Tensor], low: torch.dtype | None, backward: bool) -> None:
    """A forward, and what a trainer does with its loss."""
    device = next(iter(shown.values())).device.type
    try:
        shown = {name: torch.empty_like(value) for name, value in shown.items()}
        with torch.set_grad_enabled(backward), torch.autocast(device, low) if low else nullcontext():
            value = loss(call(adapter.model, shown), shown)
        if backward:
            penalty = adapter.penalty()
            (value if penalty is None else value + penalty).backward()
    except Exception as error:  # of any code of any model, which has never met a tensor without values
        why = str(error).strip().partition("\n")[0]
        raise Untraceable(f"a step does not run on shapes alone ({type(error).__name__}: {why})") from error


def _cut(batch: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """The beginnings of the texts; a label of a text has one axis only."""
    return {name: value[:, :length] if value.ndim > 1 else value for name, value in batch.items()}


@contextmanager
def _emptied(adapter: Adapter, trained: list[nn.Parameter]) -> Iterator[None]:
    """A model in training without gradients, and with shapes in the place of its buffers."""
    kept, modes = [p.grad for p in trained], [(module, module.training) for module in adapter.model.modules()]
    # A counter among the buffers is small enough for torch to count with it: buffers are replaced for the time.
    buffers = [(module, dict(module._buffers)) for module in adapter.model.modules()]
    without_values(adapter.model, parameters=False)
    adapter.model.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, own in buffers:
            module._buffers.update(own)
        for parameter, gradient in zip(trained, kept, strict=True):
            parameter.grad = gradient


def without_values(model: nn.Module, parameters: bool = True) -> None:
    """Give a model shapes in the place of its tensors; called within ``shapes_only``.

    Args:
        model: what is on the meta device is on the CPU afterwards.
        parameters: whether these are replaced, too, and not the buffers alone.
    """
    made: dict[int, Tensor] = {}

    def shape(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            device = "cpu" if tensor.is_meta else tensor.device
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            learns = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if learns else empty
        return made[id(tensor)]

    for module in model.modules():
        kinds: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in kinds if parameters else kinds[1:]:
            tensors.update({name: shape(tensor) for name, tensor in tensors.items() if tensor is not None})
