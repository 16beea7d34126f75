"""OSoRA: train the leading singular values and one factor per output, between frozen singular bases.

    W' = W0 + diag(o) L diag(C) A − L diag(C₀) A        L = U_r    C₀ = σ_r    A = V_rᵀ    o = 1, (m,)

J. Han, X. Zhang, Y. Zhang. OSoRA: Output-Dimension and Singular-Value Initialized Low-Rank Adaptation.
arXiv:2505.14350.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.decomposition import Product
from svdpeft.methods.base import Decomposed, Factors, Given, Reference, Tensors, Unscaled
from svdpeft.registry import METHODS


@METHODS.register("osora")
@dataclass(frozen=True)
class OSoRA(Decomposed, Unscaled):
    """r + m values per weight: strengths of directions, and strengths of outputs.

    When to use:
        Where a few thousand values per weight must do and a core between singular bases, such as SVF's, is too stiff: o
        scales outputs within the leading directions. The number of values hardly grows with the rank, so ranks are
        large. An adapter is a LoRA of rank r.

    Paper and code:
        There was no official code to compare with; that o starts at one is what makes the start exact, and the learning
        rate is that of SVF here.

    Example:
        >>> OSoRA(rank=64).count(1, 300, 200)
        364
    """

    rank: int | dict[str, int] | None = 64

    trains: ClassVar = ("C", "o")
    learning_rates: ClassVar = {"vision": 1e-2, "language": 4e-3}
    latex: ClassVar[str] = (
        r"W' = W_0 + \mathrm{diag}(o)\,U_r\,\mathrm{diag}(C)\,V_r^\top - U_r \Sigma_r V_r^\top,\qquad o_0 = 1"
    )
    reference: ClassVar = Reference(
        key="han2025osora",
        authors="Han, Jialong and Zhang, Si and Zhang, Ke",
        title="OSoRA: Output-Dimension and Singular-Value Initialized Low-Rank Adaptation",
        year=2025,
        arxiv="2505.14350",
    )

    def start(self, w: Tensor, given: Given) -> Tensors:
        u, s, vh = self.svd(w, given)
        return {"L": u, "C": s, "A": vh, "o": torch.ones_like(w[..., 0])}

    def count(self, batch: int, m: int, n: int) -> int:
        """r + m per matrix."""
        return batch * (self._rank + m)

    def now(self, f: Factors) -> Product:
        return Product(f.o.unsqueeze(-1) * f.L, f.C, f.A)
