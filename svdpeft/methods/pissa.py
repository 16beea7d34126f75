"""PiSSA: train the principal part of the weight, its singular values split over both factors.

    W' = W0 + s(L A − L₀A₀)        L₀ = U_r √Σ_r    A₀ = √Σ_r V_rᵀ    s = α/r

F. Meng, Z. Wang, M. Zhang. PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
Models. NeurIPS 2024, arXiv:2404.02948.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from svdpeft.methods.base import Decomposed, Given, Reference, Tensors, Triplets
from svdpeft.registry import METHODS


@METHODS.register("pissa")
@dataclass(frozen=True)
class PiSSA(Decomposed, Triplets):
    """LoRA started from the weight's leading singular triplets instead of from zero.

    When to use:
        In the place of LoRA at the same size: it begins in the directions that carry the weight instead of with a zero
        factor, and its authors report faster convergence for it. It needs an SVD at the start and keeps a copy of both
        factors. What it moves are the directions that the base relies on most, so watch what is forgotten.

    Paper and code:
        The paper and its code write the residual into the weight; here the weight stays and the start is subtracted:
        ``adapter.fold()`` gives the papers' layout.
        PEFT divides the singular values by the scale α/r; here W' starts at W0 for every scale, and nothing is divided.

    Args:
        alpha: α; ``None`` is α = r, the paper's choice.
    """

    learning_rates: ClassVar = {"vision": 3e-3, "language": 2e-4}
    latex: ClassVar[str] = (
        r"W' = W_0 + s\,(L A - L_0 A_0),\qquad L_0 = U_r \sqrt{\Sigma_r},\quad A_0 = \sqrt{\Sigma_r}\, V_r^\top"
    )
    reference: ClassVar = Reference(
        key="meng2024pissa",
        authors="Meng, Fanxu and Wang, Zhaohui and Zhang, Muhan",
        title="PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
        year=2024,
        venue="Advances in Neural Information Processing Systems",
        arxiv="2404.02948",
    )

    def start(self, w: Tensor, given: Given) -> Tensors:
        left, right = self.svd(w, given).balanced()
        return {"L": left, "A": right}
