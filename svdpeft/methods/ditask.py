"""DiTASK: bend the spectrum of a weight by one smooth, order-preserving map.

    W' = W0 + U (diag(ψ(σ)) − Σ) Vᵀ        ψ(x) = z(1),  dz/dt = v(z),  z(0) = x

v is continuous and piecewise affine on the cells of [0, 2σ₁], zero at both ends; θ are its values at the nodes between,
in units of σ₁, and θ = 0 is ψ(x) = x (a CPAB transformation, O. Freifeld et al., 2017).

K. S. I. Mantri, C.-B. Schönlieb, B. Ribeiro, C. Baskin, M. Eliasof. DiTASK: Multi-Task Fine-Tuning with Diffeomorphic
Transformations. CVPR 2025, arXiv:2502.06029.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from svdpeft.methods.base import Factors, Given, Reference, Tensors
from svdpeft.methods.base.frozen_bases import FrozenBases
from svdpeft.registry import METHODS

SMALL = 1e-3  # of an argument: below it a series of five terms is good to the last digit of float64
NEVER = 2.0  # time to a node that is not reached: more than there is


@METHODS.register("ditask")
@dataclass(frozen=True)
class DiTASK(FrozenBases):
    """Singular values move together, by a few numbers per weight, and never cross.

    When to use:
        Where a handful of values per weight must do and the order of its directions should stay: none of them vanishes,
        and two that were equal stay equal. Neighbouring values move alike, so it has fewer ways to go than SVF. U and V
        are stored beside the weight, twice the size of a square one. Each forward follows min(m, n) values through the
        cells: more time than other methods of this size take.

    Paper and code:
        The paper maps the singular values. The code bends their index and interpolates, which keeps the largest and the
        smallest; here the values are mapped, and the interval is [0, 2σ₁], so that the largest can move, too: ours.
        The code draws θ and starts off the base model; here θ = 0. It has a further θ per task and shares them between
        the parts of a fused weight: here each weight has one.
        The code has 64 cells, and 4 for a θ per task; a θ here is the velocity at a node, and the code's a coordinate
        in an orthonormal basis of these fields.

    Args:
        rank: number of leading singular values that are mapped, or a mapping from site pattern to it; ``None`` is all.
        driver: of the decomposition; at full rank always exact.
        cells: of the interval; θ has one value fewer.

    Example:
        >>> DiTASK(cells=32).count(1, 4096, 4096)
        31
    """

    rank: int | dict[str, int] | None = None
    cells: int = 32

    trains: ClassVar = ("theta",)
    knob: ClassVar[str] = "cells"
    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    latex: ClassVar[str] = (
        r"W' = U\,\mathrm{diag}(\psi_\theta(\sigma))\,V^\top,\qquad \psi_\theta(x) = z(1),\; "
        r"\dot z = v_\theta(z),\; z(0) = x,\quad \theta_0 = 0"
    )
    reference: ClassVar = Reference(
        key="mantri2025ditask",
        authors="Mantri, Krishna Sri Ipsit and Schönlieb, Carola-Bibiane and Ribeiro, Bruno and Baskin, Chaim and "
        "Eliasof, Moshe",
        title="DiTASK: Multi-Task Fine-Tuning with Diffeomorphic Transformations",
        year=2025,
        venue="IEEE/CVF Conference on Computer Vision and Pattern Recognition",
        arxiv="2502.06029",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cells < 2:
            raise ValueError(f"cells {self.cells} is below 2: there is no node between the ends")

    def start(self, w: Tensor, given: Given) -> Tensors:
        return self.bases(w, given) | {"theta": w.new_zeros(*w.shape[:-2], self.cells - 1)}

    def change(self, f: Factors) -> Tensor:
        half = self.cells / 2  # cells up to σ₁
        top = torch.where(f.sigma[..., :1] > 0, f.sigma[..., :1], 1.0)  # one matrix of a batch may be all zero
        x, v = f.sigma / top * half, F.pad(f.theta, (1, 1)) * half  # in cells
        right = _moved_right(x, v)
        left = _moved_right(self.cells - x, -v.flip(-1))
        return torch.where(_at(x, v)[2] >= 0, right, -left) * (top / half)

    def count(self, batch: int, m: int, n: int) -> int:
        """cells − 1 per matrix."""
        return batch * (self.cells - 1)

    def knob_values(self, sites: object) -> range:
        return range(2, 65)


def _at(x: Float[Tensor, "*b k"], v: Float[Tensor, "*b n"]) -> tuple[Tensor, Tensor, Tensor]:
    """The cell that each point is in, where in it, and how fast it moves there."""
    cell = x.detach().floor().clamp(0, v.shape[-1] - 2).long()
    inside = x - cell
    start, end = v.gather(-1, cell), v.gather(-1, cell + 1)
    return cell, inside, start + inside * (end - start)


def _moved_right(x: Float[Tensor, "*b k"], v: Float[Tensor, "*b n"]) -> Float[Tensor, "*b k"]:
    """How far the points that do not move left get in a time of one, in cells; of others any finite number."""
    cell, inside, speed = _at(x, v)
    speed = torch.where(speed >= 0, speed, 0.0)  # at rest there is a gradient, which a clamp has none of
    start, end = v[..., :-1], v[..., 1:]  # of every cell
    # The time to the end of the own cell, and to cross each further one; a sum of them is the time to a node.
    out = _time(speed, end.gather(-1, cell), 1 - inside)
    number = torch.arange(v.shape[-1] - 1, device=v.device)
    beyond, own = number > cell.unsqueeze(-1), number == cell.unsqueeze(-1)  # (*b, k, cells)
    spans = torch.where(beyond, _time(start, end, 1.0).unsqueeze(-2), torch.where(own, out.unsqueeze(-1), 0.0))
    time = spans.cumsum(-1)
    crossed = ((time <= 1) & (beyond | own)).sum(-1)  # nodes on the way
    last = (cell + crossed - 1).clamp(min=0)
    left = 1 - torch.where(crossed > 0, time.gather(-1, last.unsqueeze(-1)).squeeze(-1), 0.0)
    cell = cell + crossed
    begun = v.gather(-1, cell)
    slope = v.gather(-1, cell + 1) - begun
    speed = torch.where(crossed > 0, begun, speed)
    return torch.where(crossed > 0, crossed - inside, 0.0) + speed * left * _growth(slope * left)


def _time(start: Tensor, end: Tensor, length: Tensor | float) -> Tensor:
    """log(end/start) / (end − start) times a length, the time for it between these velocities."""
    moves = (start > torch.finfo(start.dtype).eps ** 2) & (end > 0)  # slower ones get nowhere in a time of one
    start, end = torch.where(moves, start, 1.0), torch.where(moves, end, 1.0)
    z = (end - start) / start
    small = z.abs() < SMALL
    series = 1 - z / 2 + z**2 / 3 - z**3 / 4 + z**4 / 5
    large = torch.where(small, 1.0, z)
    found = torch.where(small, series, torch.log1p(large) / large) / start
    return torch.where(moves, found * length, NEVER)


def _growth(y: Tensor) -> Tensor:
    """(e^y − 1) / y."""
    small = y.abs() < SMALL
    large = torch.where(small, 1.0, y)
    return torch.where(small, 1 + y / 2 + y**2 / 6 + y**3 / 24 + y**4 / 120, torch.expm1(large) / large)
