"""LoRA-Dash: LoRA, and after a while strengths of their own for the directions that it has changed most.

    W' = W0 + s L A + U_k diag(δ) V_kᵀ        L = 0    A ~ U(−1/√n, 1/√n)    δ = 0    s = α/r
    after the warm-up:  U_k, V_k ← the k triplets of W0 with the largest |u_iᵀ s L A v_i| / σ_i

C. Si, Z. Shi, S. Zhang, X. Yang, H. Pfister, W. Shen.
Unleashing the Power of Task-Specific Directions in Parameter Efficient Fine-tuning. ICLR 2025, arXiv:2409.01035.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from svdpeft.decomposition import truncated_svd
from svdpeft.methods.base import Given, Reference, Tensors, generator
from svdpeft.methods.base.dash import Dash
from svdpeft.methods.base.drawn import kaiming
from svdpeft.registry import METHODS


@METHODS.register("lora-dash")
@dataclass(frozen=True)
class LoRADash(Dash):
    """LoRA with k more values per weight, for the singular directions that matter to the task.

    When to use:
        Where LoRA is used, trainings are longer than the warm-up, and memory is no matter: until the choice any
        direction may be chosen, so U and V stay beside the weight, twice the size of a square one. A file need not have
        them, as with SVFT. Rates divide by σ, which favours small singular values.

    Paper and code:
        The published code counts calls of the layer, accumulated and evaluated ones too; here the steps of the
        optimizer count.
        In its port to language models U_k and V_k become parameters that no optimizer holds; here they are frozen and
        δ trains.
        Singular values that are rounding, whose vectors mean nothing, are never chosen: ours.

    Args:
        alpha: α of s = α/r; ``None`` is α = r.
        driver: of the decomposition; of all triplets always exact.

    Example:
        >>> LoRADash(rank=4).count(1, 30, 20)  # 4 · 50 + 8
        208
    """

    anchored: ClassVar[bool] = False
    draws: ClassVar = True
    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    latex: ClassVar[str] = r"W' = W_0 + s\,L A + U_k\,\mathrm{diag}(\delta)\,V_k^\top,\qquad L_0 = 0,\; \delta_0 = 0"
    reference: ClassVar = Reference(
        key="si2025loradash",
        authors="Si, Chongjie and Shi, Zhiyi and Zhang, Shifan and Yang, Xiaokang and Pfister, Hanspeter and Shen, Wei",
        title="Unleashing the Power of Task-Specific Directions in Parameter Efficient Fine-tuning",
        year=2025,
        venue="International Conference on Learning Representations",
        arxiv="2409.01035",
    )

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        a = kaiming(*batch, self._rank, n, source=generator(given.seed)).to(w)
        tensors = {"L": w.new_zeros(*batch, m, self._rank), "A": a}
        if not self.directions:
            return tensors
        return tensors | self.choice(*truncated_svd(w, min(m, n), self.driver, seed=given.seed, where=given.name))

    def count(self, batch: int, m: int, n: int) -> int:
        """r (m + n) + k per matrix."""
        return batch * (self._rank * (m + n) + self.directions)
