"""OPLoRA: LoRA that is kept orthogonal to the leading singular directions of the weight, on both sides.

    W' = W0 + s P_L L A P_R        P_L = I − U_k U_kᵀ    P_R = I − V_k V_kᵀ    L = 0    A ~ U(−1/√n, 1/√n)    s = α/r
    so that  W' V_k = U_k Σ_k  and  U_kᵀ W' = Σ_k V_kᵀ

The projections are made where factors change, once after each step, and not in every forward: P_L L = L and A P_R = A.

Y. Xiong, X. Xie. OPLoRA: Orthogonal Projection LoRA Prevents Catastrophic Forgetting during Parameter-Efficient
Fine-Tuning. AAAI 2026, arXiv:2510.13003.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.decomposition import truncated_svd
from svdpeft.methods.base import Decomposed, Factors, Given, Progress, Reference, Scaled, Tensors, generator
from svdpeft.methods.base.drawn import kaiming
from svdpeft.registry import METHODS


@METHODS.register("oplora")
@dataclass(frozen=True)
class OPLoRA(Decomposed, Scaled):
    """What the weight does with its k leading singular triplets cannot change.

    When to use:
        Where the base must forget little: the leading triplets stay singular triplets of W', exactly, whatever is
        learned beside them. It keeps U_k and V_k, k(m + n) frozen values, and costs two thin products after each step.
        How much of the weight is protected is k, apart from the rank.

    Paper and code:
        There was no official code to compare with; k of the published runs is not known here. Projections after each
        step and projections in the forward have the same functions in reach; moments of Adam differ between them.
        Two other methods have the name: an optimizer that alternates, and factors predicted by a network.

    Args:
        alpha: α of s = α/r; ``None`` is α = r.
        protects: k; of a small matrix at most all of its triplets but one, which is none of a single row.

    Example:
        >>> OPLoRA(rank=4).count(1, 30, 20)
        200
    """

    rank: int | dict[str, int] | None = 16
    protects: int = 16

    anchored: ClassVar[bool] = False
    draws: ClassVar = True
    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    latex: ClassVar[str] = r"W' = W_0 + s\,(I - U_k U_k^\top)\,L A\,(I - V_k V_k^\top),\qquad L_0 = 0"
    reference: ClassVar = Reference(
        key="xiong2026oplora",
        authors="Xiong, Yifeng and Xie, Xiaohui",
        title="OPLoRA: Orthogonal Projection LoRA Prevents Catastrophic Forgetting during Parameter-Efficient "
        "Fine-Tuning",
        year=2026,
        venue="Proceedings of the AAAI Conference on Artificial Intelligence",
        arxiv="2510.13003",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protects < 1:
            raise ValueError(f"protects {self.protects} is below 1: a LoRA protects nothing")

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        k = min(self.protects, m - 1, n - 1)  # 0 of a single row or column: to protect all is to train nothing
        u, _, vh = truncated_svd(w, max(k, 1), self.driver, seed=given.seed, where=given.name)
        u, vh = u[..., :k], vh[..., :k, :]
        a = kaiming(*batch, self._rank, n, source=generator(given.seed)).to(w)
        return {"L": w.new_zeros(*batch, m, self._rank), "A": a - (a @ vh.mT) @ vh, "U": u, "V": vh}

    def tensor_names(self) -> list[str]:
        return [*super().tensor_names(), "U", "V"]

    @torch.no_grad()
    def after_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        for f in sites:
            f.L.sub_(f.U @ (f.U.mT @ f.L))
            f.A.sub_((f.A @ f.V.mT) @ f.V)
