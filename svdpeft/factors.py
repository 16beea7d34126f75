"""What a site holds, and what a method may know of a site when it starts there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from svdpeft.decomposition import Product

Tensors = dict[str, Tensor]
CPU = torch.device("cpu")


class Factors(nn.Module):
    """The tensors of one site by name (``L``, ``C``, ``A`` and what a method adds), a child of the adapted layer.

    Everything floating point is a parameter, the frozen ones with ``requires_grad=False``: unlike buffers they are
    sharded with the layer and are not broadcast at every step. Start values are called ``L0``, ``C0``, ``A0``.

    Args:
        tensors: of this site alone.
        trains: names of those that train.
        tied: what several sites share, the same objects in each: parameters, and integer tensors.
        shape: (batch, m, n) of the site, for methods that cut their part out of what is shared.
    """

    L: Tensor
    C: Tensor
    A: Tensor
    sigma: Tensor
    index: Tensor
    gate: Tensor
    mag: Tensor
    norm0: Tensor
    s: Tensor
    U: Tensor
    V: Tensor
    D: Tensor
    X: Tensor
    Y: Tensor
    c: Tensor
    z: Tensor
    Q: Tensor
    P: Tensor
    G: Tensor
    alpha_vec: Tensor
    beta_vec: Tensor
    strength: Tensor
    coefficient: Tensor

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor:
            """Whatever a method calls its tensors."""
            ...

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        trains: Sequence[str],
        tied: dict[str, Tensor] | None = None,
        shape: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        super().__init__()
        self.trains, self.tied, self.shape = tuple(trains), tuple(tied or ()), shape
        self._shared = {} if tied is None else tied  # one mapping in all sites of a group
        self.memory: Tensors = {}  # what a method keeps from step to step: of a training, not of the adapter
        self._seen: list[tuple[int, int, int]] | None = None
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                # contiguous, as it comes back from a file: another layout may take another kernel
                self.register_parameter(name, nn.Parameter(tensor.contiguous(), requires_grad=name in trains))
            else:
                self.register_buffer(name, tensor)
        for name, tensor in (tied or {}).items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def _apply(self, fn: Any, recurse: bool = True) -> Factors:
        """Move or cast: a parameter keeps its identity, and a shared integer tensor is moved once for all sites."""
        super()._apply(fn, recurse)
        for name in self._buffers.keys() & self._shared.keys():
            moved, shared = self._buffers[name], self._shared[name]
            assert moved is not None
            if moved.device == shared.device:
                self._buffers[name] = shared
            else:
                self._shared[name] = moved
        return self

    def tensors(self) -> Tensors:
        """Every tensor of the site, detached, by name."""
        return {name: t.detach() for name, t in (*self._parameters.items(), *self._buffers.items()) if t is not None}

    def changed(self) -> bool:
        """Whether what trains was written to since this was last asked, and ``settle`` was not called since."""
        trained = [p for p in self._parameters.values() if p is not None and p.requires_grad]
        now = [(id(p), p._version, optimizer_steps(p)) for p in trained]
        seen, self._seen = self._seen, now
        return seen is not None and any(a[0] == b[0] and a != b for a, b in zip(seen, now, strict=False))

    def settle(self) -> None:
        """Take what is there as it is: a method's own step was done, or another state was loaded."""
        self._seen = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.settle()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.settle()  # a copy has parameters of its own

    def started(self, name: str) -> Tensor:
        """The start value of a factor: ``L0`` where ``L`` trains, ``L`` itself where it is frozen."""
        return getattr(self, f"{name}0" if f"{name}0" in self._parameters else name)


def share(tensors: Tensors, trains: Sequence[str]) -> Tensors:
    """Make what several sites will share: parameters, and integer tensors as they are."""
    return {
        name: nn.Parameter(t.contiguous(), requires_grad=name in trains) if t.is_floating_point() else t
        for name, t in tensors.items()
    }


class Statistics(NamedTuple):
    """What a calibration saw of one site: float32, summed over everything it was shown.

    Args:
        count: number of input vectors.
        second: Σ x xᵀ, (*b, n, n).
        total: Σ x, (*b, n).
        gradient: mean over the batches of ∂loss/∂W, (*b, m, n).
    """

    count: int = 0
    second: Tensor | None = None
    total: Tensor | None = None
    gradient: Tensor | None = None


class Partner(NamedTuple):
    """The other weight of a pair, of which only the product counts, head by head.

    Args:
        pair: ``"qk"``, where the site is the query, or ``"vo"``, where it is the output projection.
        weight: gives the key, or the value, as matrices (h, d, n); h divides the number of heads of the site.
    """

    pair: str
    weight: Callable[[], Tensor]


@dataclass(frozen=True)
class Given:
    """One site as a method sees it when it starts there.

    Args:
        name: of the site.
        shape: (batch, m, n).
        seed: of this site, different from every other site's.
        weight: gives the weight as matrices, (*b, m, n), finite, float32 or float64.
        roles: further names of the site.
        statistics: what ``svdpeft.calibrate`` saw of it.
        shared: the tensors that the site shares with its group, by name.
        position: of the site among those that are adapted together, in the model's order.
        origin: the seed of the attachment, the same for all sites.
        dtype: in which the method computes.
        device: of the weight.
        partner: the other half of the pair that the site belongs to, for methods with ``pairs``.
    """

    name: str
    shape: tuple[int, int, int]
    seed: int
    weight: Callable[[], Tensor]
    roles: tuple[str, ...] = ()
    statistics: Statistics | None = None
    shared: dict[str, Tensor] = field(default_factory=dict)
    position: int = 0
    origin: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    partner: Partner | None = None

    def sharing(self, shared: dict[str, Tensor]) -> Given:
        """The same site with what its group shares."""
        return replace(self, shared=shared)

    def module_type(self, words: int = 1) -> str:
        """What the site is called in every block: the last parts of its name that are not numbers.

        Example:
            >>> Given("layers.3.attn.q_proj", (1, 8, 8), 0, torch.Tensor).module_type(2)
            'attn.q_proj'
        """
        return ".".join([part for part in self.name.split(".") if not part.isdigit()][-words:])

    def seen(self, what: str, method: str) -> Tensor:
        """Return one of the statistics.

        Raises:
            ValueError: there is no calibration, or it did not see this.
        """
        if self.statistics is None or (found := getattr(self.statistics, what)) is None:
            needed = "gradients" if what == "gradient" else "inputs"
            raise ValueError(
                f"{method} starts from the {needed} of {self.name}: pass "
                f"attach(..., calibration=svdpeft.calibrate(model, batches, {needed}=True))"
            )
        return found

    def check_seen(self, needs: str, method: str) -> None:
        """Raise ``ValueError`` where a calibration lacks what a method needs of the site, or has it in other shapes."""
        batch, m, n = self.shape
        what, shape = ("second", (batch, n, n)) if needs == "inputs" else ("gradient", (batch, m, n))
        found = self.seen(what, method)
        if (found.numel() // max(math.prod(found.shape[-2:]), 1), *found.shape[-2:]) != shape:
            raise ValueError(
                f"the calibration is of another model: at {self.name} it has {needs} of shape {list(found.shape)}, "
                f"where {batch} matrices of {m}x{n} are"
            )


@dataclass(frozen=True)
class Progress:
    """Where a training is, for what a method does around an optimizer step.

    Args:
        step: number of the step, from 1.
        total: number of steps of the whole training; ``None`` where nobody has said.
        lr_scale: lr_t / lr_peak of the schedule.
        peak_lr: its largest learning rate; 0 where it is not known.
    """

    step: int = 1
    total: int | None = None
    lr_scale: float = 1.0
    peak_lr: float = 0.0


class Call(Protocol):
    """A layer that is being called, as a method outside the equation sees it; what kind of layer it is stays hidden.

    Outputs are without the bias, in the dtype that the layer computes in, and new tensors.
    """

    x: Tensor  # the layer's input

    @property
    def w0(self) -> Tensor:
        """W0 as matrices, (*b, m, n), at least float32."""
        ...

    def rows(self, values: Tensor) -> Tensor:
        """Return diag(values) W0 x, values (*b, m)."""
        ...

    def columns(self, values: Tensor) -> Tensor:
        """Return W0 diag(values) x, values (*b, n)."""
        ...

    def frozen(self, x: Tensor) -> Tensor:
        """Return W0 x of another input; only where the layer multiplies the last axis of its input."""
        ...

    def per_row(self, values: Tensor) -> Tensor:
        """Return one value per row, (m,), as what multiplies an output; only where ``frozen`` can be asked for."""
        ...

    def add(self, out: Tensor, product: Product, dropout: float) -> Tensor:
        """Add s L C A x to ``out``, in place, with this dropout on x in training."""
        ...


_steps: dict[int, int] = {}  # of the parameters that are watched, by identity


def optimizer_steps(p: nn.Parameter) -> int:
    """How many optimizer steps there were on a parameter since this was first asked.

    A fused optimizer writes to its parameters without raising their version.
    """
    if not _steps:
        register_optimizer_step_post_hook(_count_step)
    return _steps.setdefault(id(p), 0)


def _count_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if id(p) in _steps:
            _steps[id(p)] += 1


def check_numbers(parameters: Any) -> None:
    """Refuse hyper-parameters, the fields of a dataclass, that are no numbers, or no whole ones where they count."""
    for name, type_ in ((f.name, f.type) for f in dataclasses.fields(parameters)):
        value = getattr(parameters, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} {value} is not a finite number")
        if type_ in ("int", "int | None") and isinstance(value, (float, bool)):
            raise ValueError(f"{name} {value!r} is not a whole number")


def by_shape(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Group the positions of tensors that can be stacked, so that one batched call serves many sites.

    Example:
        >>> by_shape([torch.zeros(2, 3), torch.zeros(1), torch.zeros(2, 3)])
        [[0, 2], [1]]
    """
    groups: dict[tuple, list[int]] = {}
    for i, t in enumerate(tensors):
        groups.setdefault((t.shape, t.dtype, t.device), []).append(i)
    return list(groups.values())
