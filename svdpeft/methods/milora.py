"""MiLoRA: train the minor part of the weight, its smallest singular values split over both factors.

    W' = W0 + s(L A − L₀A₀)        L₀ = U_−r √Σ_−r    A₀ = √Σ_−r V_−rᵀ    s = α/r

U_−r, Σ_−r, V_−r are the last r of the min(m, n) triplets of the thin SVD, so the null space of W0 has no part in it.

H. Wang, Y. Li, S. Wang, G. Chen, Y. Chen. MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM
Finetuning. NAACL 2025, arXiv:2406.09044.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from svdpeft.decomposition import minor_svd
from svdpeft.methods.base import Given, Reference, Tensors, Triplets
from svdpeft.registry import METHODS


@METHODS.register("milora")
@dataclass(frozen=True)
class MiLoRA(Triplets):
    """PiSSA's mirror image: LoRA started from the weight's trailing singular triplets.

    When to use:
        When what the base knows should suffer little: the principal directions start frozen and the factors start
        small. They also learn slowly at first, because a gradient is multiplied by √σ of the smallest values; where
        W0 has singular values of zero, the columns that belong to them never train. The start takes a whole SVD of
        every weight. The paper trains rank 64 with α = 64 and dropout 0.05 at a learning rate of 3e-4.

    Paper and code:
        The published code subtracts L₀A₀ from a float16 weight and so starts off by one rounding; not offered.

    Args:
        alpha: α; ``None`` is α = r, the paper's choice.
    """

    learning_rates: ClassVar = {"vision": 3e-3, "language": 3e-4}
    latex: ClassVar[str] = (
        r"W' = W_0 + s\,(L A - L_0 A_0),\quad "
        r"L_0 = U_{-r}\sqrt{\Sigma_{-r}},\quad A_0 = \sqrt{\Sigma_{-r}}\,V_{-r}^\top"
    )
    reference: ClassVar = Reference(
        key="wang2025milora",
        authors="Wang, Hanqing and Li, Yixia and Wang, Shuo and Chen, Guanhua and Chen, Yun",
        title="MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning",
        year=2025,
        venue="Conference of the Nations of the Americas Chapter of the Association for Computational Linguistics",
        arxiv="2406.09044",
    )

    def start(self, w: Tensor, given: Given) -> Tensors:
        left, right = minor_svd(w, self._rank, where=given.name).balanced()
        return {"L": left, "A": right}
