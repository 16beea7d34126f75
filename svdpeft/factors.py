"""What a site holds, and what a method may know of a site when it starts there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor, nn

Tensors = dict[str, Tensor]


class Factors(nn.Module):
    """The tensors of one site by name (``L``, ``C``, ``A`` and what a method adds), a child of the adapted layer.

    Everything floating point is a parameter, the frozen ones with ``requires_grad=False``: unlike buffers they are
    sharded with the layer and are not broadcast at every step. Start values are called ``L0``, ``C0``, ``A0``.

    Args:
        tensors: of this site alone.
        trains: names of those that train.
        tied: parameters that several sites share, the same objects in each.
    """

    L: Tensor
    C: Tensor
    A: Tensor
    sigma: Tensor
    index: Tensor
    gate: Tensor
    z: Tensor
    Q: Tensor
    P: Tensor
    G: Tensor
    alpha_vec: Tensor
    beta_vec: Tensor
    strength: Tensor
    coefficient: Tensor

    def __init__(
        self, tensors: Mapping[str, Tensor], trains: Sequence[str], tied: Mapping[str, nn.Parameter] | None = None
    ) -> None:
        super().__init__()
        self.trains, self.tied = tuple(trains), tuple(tied or ())
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=name in trains))
            else:
                self.register_buffer(name, tensor)
        for name, parameter in (tied or {}).items():
            self.register_parameter(name, parameter)

    def tensors(self) -> Tensors:
        """Every tensor of the site, detached, by name."""
        return {name: t.detach() for name, t in (*self._parameters.items(), *self._buffers.items()) if t is not None}

    def started(self, name: str) -> Tensor:
        """The start value of a factor: ``L0`` where ``L`` trains, ``L`` itself where it is frozen."""
        return getattr(self, f"{name}0" if f"{name}0" in self._parameters else name)


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
    """

    name: str
    shape: tuple[int, int, int]
    seed: int
    weight: Callable[[], Tensor]
    roles: tuple[str, ...] = ()
    statistics: Statistics | None = None
    shared: Mapping[str, nn.Parameter] = field(default_factory=dict)

    def sharing(self, shared: Mapping[str, nn.Parameter]) -> Given:
        """The same site with what its group shares."""
        return replace(self, shared=shared)

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
