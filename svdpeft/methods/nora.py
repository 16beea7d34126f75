"""NoRA: a small trained pair nested between two frozen factors of the weight.

    W' = W0 + s L P Q A        L = U_r √Σ_r    A = √Σ_r V_rᵀ    P = 0, r×r'    Q ~ U(−1/√r, 1/√r), r'×r    s = α/r

C. Lin, L. Li, D. Li, J. Zou, W. Xue, Y. Guo. NoRA: Nested Low-Rank Adaptation for Efficient Fine-Tuning Large Models.
arXiv:2408.10280.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from svdpeft.decomposition import Product
from svdpeft.methods.base import Decomposed, Factors, Given, Reference, Scaled, Tensors, generator
from svdpeft.methods.base.drawn import kaiming
from svdpeft.registry import METHODS


@METHODS.register("nora")
@dataclass(frozen=True)
class NoRA(Decomposed, Scaled):
    """A LoRA within the leading singular directions of the weight: 2 r r' values, whatever its size.

    When to use:
        As LoRA-XS, whose dense r×r core it replaces by a product: a wider window of frozen directions at the same
        number of values. All of the update lies between the leading singular vectors, and an adapter is a LoRA of rank
        r'. The frozen factors are r(m + n) values per weight.

    Paper and code:
        There was no official code to compare with: that P starts at zero, which makes the start exact, both default
        ranks and the learning rates, LoRA-XS's, are ours. A later version of the paper decomposes the weight under its
        inputs, as CorDA does: not offered.

    Args:
        alpha: α of s = α/r; ``None`` is α = r.
        inner_rank: r', lowered to r.

    Example:
        >>> NoRA(rank=64, inner_rank=16).count(1, 4096, 4096)
        2048
    """

    rank: int | dict[str, int] | None = 64
    inner_rank: int = 16

    trains: ClassVar = ("P", "Q")
    anchored: ClassVar[bool] = False
    resolved: ClassVar = ("rank", "alpha", "inner_rank")
    draws: ClassVar = True
    family: ClassVar = "core"
    learning_rates: ClassVar = {"vision": 1e-2, "language": 4e-3}
    latex: ClassVar[str] = (
        r"W' = W_0 + s\,U_r \sqrt{\Sigma_r}\,P\,Q\,\sqrt{\Sigma_r}\,V_r^\top,\qquad P_0 = 0,\quad "
        r"P, Q^\top \in \mathbb{R}^{r \times r'}"
    )
    reference: ClassVar = Reference(
        key="lin2024nora",
        authors="Lin, Cheng and Li, Lujun and Li, Dezhi and Zou, Jie and Xue, Wei and Guo, Yike",
        title="NoRA: Nested Low-Rank Adaptation for Efficient Fine-Tuning Large Models",
        year=2024,
        arxiv="2408.10280",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner_rank < 1:
            raise ValueError(f"inner_rank {self.inner_rank} is below 1")

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()):
        here = super().at(site, m, n, clip, roles)
        return dataclasses.replace(here, inner_rank=min(self.inner_rank, here._rank))

    def start(self, w: Tensor, given: Given) -> Tensors:
        left, right = self.svd(w, given).balanced()
        batch, r = w.shape[:-2], self._rank
        q = kaiming(*batch, self.inner_rank, r, source=generator(given.seed)).to(w)
        return {"L": left, "A": right, "P": w.new_zeros(*batch, r, self.inner_rank), "Q": q}

    def now(self, f: Factors) -> Product:
        return Product(f.L @ f.P, None, f.Q @ f.A, self.scale)

    def count(self, batch: int, m: int, n: int) -> int:
        """2 r r' per matrix."""
        return batch * 2 * self._rank * self.inner_rank

    def export_rank(self, m: int, n: int) -> int:
        return self.inner_rank
