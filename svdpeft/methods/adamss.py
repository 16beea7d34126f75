"""AdaMSS: rows that look alike in the leading singular space form clusters, and each gets a small update of its own.

    W'[cᵢ] = W0[cᵢ] + Bᵢ Aᵢ V_rᵀ, i = 1 … K        W' = W0 + L A V_rᵀ        Bᵢ = 0    Aᵢ: leading right singular
    vectors of U_r[cᵢ]

cᵢ are the rows of a k-means cluster of the rows of U_r; Aᵢ (ρ×r) and Bᵢ (|cᵢ|×ρ) train, V_r is frozen. L has the Bᵢ as
its blocks, one per row, and A the Aᵢ one below the other. Where singular values of U_r[cᵢ] are equal (a single cluster
has no others) any directions of theirs may be taken.

J. Zheng, W. Lu, Y. Dong, C. Ji, Y. Cao, Z. Lin. AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient
Fine-Tuning. NeurIPS 2025, openreview.net/forum?id=8ZdWmpYxT0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from svdpeft.decomposition import Product, canonical_signs, kmeans
from svdpeft.methods.base import Decomposed, Factors, Given, Reference, Tensors, Unscaled
from svdpeft.registry import METHODS


@METHODS.register("adamss")
@dataclass(frozen=True)
class AdaMSS(Decomposed, Unscaled):
    """Several narrow updates instead of one: a rank of K ρ for the price of rank ρ on the output side.

    When to use:
        Small budgets, ρ m + K ρ r values per weight, where different outputs should move in different directions. The
        frozen V_rᵀ costs r n values of memory per site. Clusters are found in the weight alone and never change, so on
        weights without such structure (flat spectra) they are arbitrary.

    Paper and code:
        The published code appends the bias to the weight as a column and adapts it too; here weights only.
        The adaptive part, which freezes clusters during training (ASA), is not offered: all of them train.
        The code's k-means has one fixed seed; here it is the site's.
        The code lowers ρ to the size of a smaller cluster; here such an Aᵢ is filled up with further orthonormal rows,
        so that the count follows from the shape.

    Args:
        clusters: K, lowered to the number of rows.
        cluster_rank: ρ, lowered to r.

    Example:
        >>> AdaMSS(rank=100, clusters=5).count(1, 768, 768)
        1268
    """

    rank: int | dict[str, int] | None = 100
    clusters: int = 5
    cluster_rank: int = 1

    family: ClassVar = "core"
    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    trains: ClassVar[tuple[str, ...]] = ("A", "B")
    anchored: ClassVar[bool] = False
    knob: ClassVar[str] = "cluster_rank"
    reference: ClassVar = Reference(
        key="zheng2025adamss",
        authors="Zheng, Jingjing and Lu, Wanglong and Dong, Yiming and Ji, Chaojie and Cao, Yankai and Lin, Zhouchen",
        title="AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning",
        year=2025,
        venue="Advances in Neural Information Processing Systems",
    )
    draws: ClassVar = True
    latex: ClassVar[str] = r"W'_{c_i} = (W_0)_{c_i} + B_i A_i V_r^\top,\quad i = 1 \ldots K"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clusters", "cluster_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")

    @property
    def _width(self) -> int:
        return min(self.cluster_rank, self._rank)

    def start(self, w: Tensor, given: Given) -> Tensors:
        u, _, vh = self.svd(w, given)
        clusters = min(self.clusters, u.shape[-2])
        label = kmeans(u, clusters, given.seed)  # (*b, m)
        rows = u.unsqueeze(-3).double() * F.one_hot(label, clusters).mT.unsqueeze(-1)  # (*b, K, m, r)
        _, vectors = torch.linalg.eigh(rows.mT @ rows)  # right singular vectors of U[c], the largest value last
        a = vectors.flip(-1)[..., : self._width].mT  # (*b, K, ρ, r)
        return {
            "A": canonical_signs(a.mT, a)[1].flatten(-3, -2).to(w),
            "B": w.new_zeros(*u.shape[:-1], self._width),
            "V": vh,
            "label": label,
        }

    def core(self, f: Factors) -> None:
        return None

    def now(self, f: Factors) -> Product:
        width = f.B.shape[-1]
        blocks = f.label.unsqueeze(-1) * width + torch.arange(width, device=f.B.device)  # (*b, m, ρ): columns of L
        left = f.B.new_zeros(*f.B.shape[:-1], f.A.shape[-2]).scatter(-1, blocks, f.B)
        return Product(left, None, f.A @ f.V)

    def count(self, batch: int, m: int, n: int) -> int:
        """ρ (m + K r) per matrix: Bᵢ and Aᵢ of K clusters."""
        return batch * self._width * (m + min(self.clusters, m) * self._rank)

    def export_rank(self, m: int, n: int) -> int:
        return min(self._rank, min(self.clusters, m) * self._width)

    def knob_values(self, sites: object) -> range:
        return range(1, 1 + (self.rank if isinstance(self.rank, int) else 1))
