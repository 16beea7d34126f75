"""What a training would take, from a model's configuration alone: sites, values, bytes, memory, time to attach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.attach import attach
from svdpeft.adapter.file import held
from svdpeft.adapter.quantising import quantisable
from svdpeft.finetuning.replay import Calls
from svdpeft.finetuning.session import recompute, seen_by
from svdpeft.finetuning.tracing import STATES, StepMemory, shapes_only, trace_step, without_values
from svdpeft.layers.quantising import scheme_named
from svdpeft.methods.base import Method, PerSite
from svdpeft.models import Loaded, load
from svdpeft.registry import near_miss
from svdpeft.tasks.base import whole
from svdpeft.training.recipe import DTYPES, Recipe
from svdpeft.training.trainer import returns_loss


@dataclass(frozen=True)
class Plan:
    """What a training would take.

    Args:
        model: its name.
        parameters: values of the base.
        method: as it is written.
        sites: weights that it adapts.
        trains: values that train.
        adapter_bytes: of the adapter's file, but for its header.
        attach_seconds: on this machine, without the batches that a method may start from; ``None``: not estimated.
        memory: of one step where a device holds everything.
        devices: that share the work.
        replicated: bytes per device where each holds everything and gradients are averaged (DDP).
        sharded: bytes per device where each holds a share of all weights, and of two blocks the whole (FSDP).
    """

    model: str
    parameters: int
    method: str
    sites: int
    trains: int
    adapter_bytes: int
    attach_seconds: float | None
    memory: StepMemory
    devices: int
    replicated: int
    sharded: int

    def to_json(self) -> dict[str, Any]:
        """Plain values; bytes are bytes."""
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


def plan(
    model: str,
    method: Method,
    recipe: Recipe,
    *,
    targets: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    train: Sequence[str] = (),
    length: int = 512,
    image_size: int | None = None,
    num_classes: int | None = None,
    dtype: str = "float32",
    optimizer: str = "adamw",
    devices: int = 1,
    quantize: str | None = None,
    timed: bool = True,
) -> Plan:
    """Return what a training would take; nothing is loaded, computed or written.

    The model is built from its configuration, a step is run on shapes alone (``finetuning.tracing``), and the calls
    that attaching makes are timed one by one on random numbers (``finetuning.replay``).

    Args:
        model: a name that ``svdpeft.models.load`` takes, or a ``config.json`` of transformers'.
        method: to attach.
        recipe: batch size, accumulation, precision and checkpoints of activations count.
        targets: as ``attach`` takes them.
        exclude: likewise.
        train: what is trained whole.
        length: tokens of a text.
        image_size: side of a vision model's input in pixels; ``None`` is the model's own.
        num_classes: of a new classifier, which is trained whole.
        dtype: of the base.
        optimizer: ``"adamw"``, ``"adamw-8bit"`` or ``"sgd"``.
        devices: that share the work, each with batches of its own.
        quantize: a scheme of ``svdpeft.quantize`` by which the base is stored. A step is then taken to hold one weight
            dequantised, the largest, beside what it holds on the plain base.
        timed: whether the time to attach is estimated, which costs seconds.

    Raises:
        ValueError: an option that does not exist or cannot be; a model that has no loss of its own and no classifier.

    Example:
        >>> recipe = Recipe(lr=1e-4, batch_size=1)
        >>> small = plan("minilm-l6", svdpeft.PiSSA(rank=16), recipe, num_classes=2, timed=False)
        >>> small.sites, small.trains
        (37, 676610)
    """
    for what, value, known in (("dtype", dtype, DTYPES), ("optimizer", optimizer, tuple(STATES))):
        if value not in known:
            raise ValueError(f"{what} {value!r}: {near_miss(str(value), known)}")
    for what, value in (("length", length), ("devices", devices)):
        if not whole(value) or not 1 <= value < 2**31:
            raise ValueError(f"{what} {value!r} is not a whole number of at least 1, and below 2^31")
    loaded = load(model, num_classes=num_classes, image_size=image_size, dtype=getattr(torch, dtype), weights=False)
    base: Any = loaded.model
    if loaded.modality == "language" and not returns_loss(base):
        raise ValueError(f"{model} has no loss of its own: a training of it needs num_classes, for a new classifier")
    if recipe.checkpoint_activations:
        recompute(base)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    new = (*loaded.fresh, *([loaded.head] if loaded.head and num_classes is not None else []))
    saved, largest = _quantised(base, quantize)
    calls = Calls()
    with shapes_only() as mode:
        without_values(base)
        batch = _batch(loaded, recipe.batch_size, length, getattr(torch, dtype))
        seen = None
        if isinstance(method, PerSite) and method.needs:
            seen = seen_by(base, method, [batch], targets, exclude, mask=lambda batch: None)
            seen = seen.preserving(seen) if method.preserves else seen
        with calls if timed else nullcontext():
            adapter = attach(base, method, targets, exclude, [*new, *train], clip_rank=True, calibration=seen)
        memory = trace_step(mode, adapter, batch, recipe.accumulate, recipe.mixed_precision, optimizer)
    memory = replace(memory, weights=memory.weights - saved, step=memory.step + largest)
    trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trained)
    return Plan(
        model=model,
        parameters=parameters,
        method=str(method),
        sites=len(adapter.sites),
        trains=adapter.trainable_count,
        adapter_bytes=_written(adapter),
        attach_seconds=calls.seconds() if timed else None,
        memory=memory,
        devices=devices,
        replicated=memory.total + (gradients if devices > 1 else 0),  # DDP's buckets
        sharded=memory.total if devices == 1 else _sharded(base, memory, gradients, devices),
    )


def _quantised(model: nn.Module, scheme: str | None) -> tuple[int, int]:
    """Bytes that a scheme saves of a model's weights, and those of the largest of these when it is dequantised."""
    if scheme is None:
        return 0, 0
    make, saved, largest = scheme_named(scheme), 0.0, 0
    for module, _ in quantisable(model).values():
        weight, some = cast(Tensor, module.weight), 64  # rows
        share = make(torch.zeros(some, weight.shape[1], dtype=weight.dtype)).nbytes / (some * weight.shape[1])
        saved += weight.nbytes - share * weight.numel()
        largest = max(largest, weight.nbytes)
    return int(saved), largest


def _batch(loaded: Loaded, size: int, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What one forward sees, as the tasks collate it."""
    if loaded.modality == "vision":
        return {"x": torch.empty(size, *loaded.processor["input_size"], dtype=dtype), "labels": _ids(size)}
    text = {"input_ids": _ids(size, length), "attention_mask": _ids(size, length)}
    return {**text, "labels": _ids(size) if loaded.head else _ids(size, length)}


def _ids(*size: int) -> Tensor:
    return torch.empty(size, dtype=torch.long)


def _written(adapter: Adapter) -> int:
    """Bytes of the tensors in the adapter's file."""
    factors = [tensor for tensors, _ in held(adapter.sites).values() for tensor in tensors.values()]
    return sum(tensor.nbytes for tensor in [*factors, *(adapter.own[name] for name in adapter.whole)])


def _sharded(model: nn.Module, memory: StepMemory, gradients: int, devices: int) -> int:
    """Bytes per device of fully sharded data parallelism: two blocks, and what is in none, are whole at a time."""
    blocks = [_bytes(block) for block in _blocks(model)]
    whole_now = _bytes(model) - sum(blocks) + 2 * max(blocks, default=0)
    shared = memory.total - memory.step + gradients
    return shared // devices + whole_now + max(memory.step - gradients, 0)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of layers."""
    for child in model.children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) > 1:
            yield from child
        else:
            yield from _blocks(child)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
