"""SVFit: train the leading singular values of a weight; the rest of its spectrum stays.

    W' = W0 + U_r (diag(C) − Σ_r) V_rᵀ        C = σ_r at the start

C. Sun, J. Wei, Y. Wu, Y. Shi, S. He, Z. Ma, N. Xie, Y. Yang. SVFit: Parameter-Efficient Fine-Tuning of Large
Pre-Trained Models Using Singular Values. arXiv:2409.05926.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.methods.base import Decomposed, Given, PerSite, Reference, Tensors, Unscaled
from svdpeft.registry import METHODS


@METHODS.register("svfit")
@dataclass(frozen=True)
class SVFit(Decomposed, Unscaled):
    """SVF on the principal part alone: r values per weight, and an export of rank r.

    When to use:
        As SVF, where storing all of U and V is too much: r(m + n) frozen values instead of those of a full basis. With
        so few trained values it needs a large r to do what LoRA does with a small one.

    Paper and code:
        The paper takes r such that W_r holds over 99 % of the weight's information; ``energy=0.99`` reads this as a
        share of ‖W0‖²_F. No code was published that these values could be checked against.

    Args:
        rank: r, or a mapping from site pattern to r; ``None`` is all min(m, n), which is SVF.
        energy: share of Σσ² in (0, 1] that the leading values must hold: each site takes the smallest such r, and
            ``rank`` is an upper bound. Costs a second look at every weight. ``None``: r is ``rank``.

    Example:
        >>> SVFit(rank=256).count(1, 1024, 4096)
        256
    """

    rank: int | dict[str, int] | None = None
    energy: float | None = None

    learning_rates: ClassVar = {"vision": 3e-2, "language": 2e-2}
    trains: ClassVar = ("C",)
    latex: ClassVar[str] = (
        r"W' = W_0 + U_r\,(\mathrm{diag}(\sigma'_r) - \Sigma_r)\,V_r^\top,\quad \sigma'_{r,0} = \sigma_r"
    )
    reference: ClassVar = Reference(
        key="sun2024svfit",
        authors="Sun, Chengwei and Wei, Jiwei and Wu, Yujia and Shi, Yiming and He, Shiyuan and Ma, Zeyu and "
        "Xie, Ning and Yang, Yang",
        title="SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
        year=2024,
        arxiv="2409.05926",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise ValueError(f"energy {self.energy} is outside (0, 1]")

    def resolve(self, sites: Sequence[Given], clip: bool) -> list[PerSite]:
        found = super().resolve(sites, clip)
        if self.energy is None:
            return found
        enough = [rank_for(torch.linalg.svdvals(site.weight()), self.energy) for site in sites]
        return [dataclasses.replace(m, rank=min(m._rank, r)) for m, r in zip(found, enough, strict=True)]  # type: ignore[attr-defined, call-arg]

    def start(self, w: Tensor, given: Given) -> Tensors:
        u, s, vh = self.svd(w, given)
        return {"L": u, "C": s, "A": vh}

    def replaces_weight(self, m: int, n: int) -> bool:
        return self._rank == min(m, n)


def rank_for(s: Tensor, energy: float) -> int:
    """The smallest r whose leading singular values hold a share of Σσ², in every matrix of the batch, (*b, k).

    Example:
        >>> rank_for(torch.tensor([3.0, 4.0, 0.0]).sort(descending=True).values, 0.64)
        1
    """
    held = s.double().square().cumsum(-1)
    return int((held < energy * held[..., -1:] * (1 - 1e-12)).sum(-1).max()) + 1
