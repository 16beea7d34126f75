"""DisLoRA: train the trailing singular triplets apart, and after a while strengths of directions that changed most.

    W' = W0 + s(L diag(C) A − L₀ diag(C₀) A₀) + s U_k diag(δ) V_kᵀ        s = α/r
    L₀ = U_−r    C₀ = σ_−r    A₀ = V_−rᵀ    δ = 0
    after the warm-up:  U_k, V_k ← of all other triplets of W0 the k with the largest |u_iᵀ ΔW v_i| / σ_i
    penalty = γ · mean of ‖LᵀL − I‖_F and ‖AAᵀ − I‖_F over all sites

Y. She, X. Wei, Y. Wang. DisLoRA: Task-specific Low-Rank Adaptation via Orthogonal Basis from Singular Value
Decomposition. EMNLP 2025, aclanthology.org/2025.emnlp-main.694.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from svdpeft.decomposition import truncated_svd
from svdpeft.methods.base import Factors, Given, Reference, Tensors
from svdpeft.methods.base.bases import errors
from svdpeft.methods.base.dash import Dash
from svdpeft.registry import METHODS


@METHODS.register("dislora")
@dataclass(frozen=True)
class DisLoRA(Dash):
    """SORSA at the other end of the spectrum, with LoRA-Dash's second stage.

    When to use:
        Where what the base relies on most is to stay and the task is to move what it uses least, in bases that stay
        near orthonormal; then k leading directions, those along which the weight has moved most for their size, get a
        strength of their own. Until the choice any of them may be chosen, so U and V stay beside the weight, twice the
        size of a square one; a file need not have them. The penalty has to be part of the loss: the trainer adds it.

    Paper and code:
        With its default the published code takes the smallest rates, of L C A and not of its change, starts δ at σ, so
        that the outputs jump at that step, and leaves the second stage out of a merge. Here the largest rates of the
        change are taken, as the paper means it, and δ starts at zero.
        The published code counts training forwards as its warm-up; here the steps of the optimizer count.
        The code's mix of both losses by their ratio (λ = 1) is not offered; γ is its trainer's.

    Args:
        alpha: α of s = α/r; ``None`` is α = r.
        driver: of the decomposition; of all triplets always exact.
        gamma: γ, weight of the penalty; 0 switches it off.

    Example:
        >>> DisLoRA(rank=4).at("layer", 30, 20).count(1, 30, 20)  # 4 · 51 + 8
        212
    """

    rank: int | dict[str, int] | None = 16
    warmup: int = 50
    gamma: float = 4e-4

    first: ClassVar = ("L", "C", "A")
    learning_rates: ClassVar = {"vision": 3e-3, "language": 3e-4}
    latex: ClassVar[str] = (
        r"W' = W_0 + s\,(L\,\mathrm{diag}(C)\,A - U_{-r} \Sigma_{-r} V_{-r}^\top) + "
        r"s\,U_k\,\mathrm{diag}(\delta)\,V_k^\top,\quad \delta_0 = 0"
    )
    reference: ClassVar = Reference(
        key="she2025dislora",
        authors="She, Yifei and Wei, Xinhao and Wang, Yulong",
        title="DisLoRA: Task-specific Low-Rank Adaptation via Orthogonal Basis from Singular Value Decomposition",
        year=2025,
        venue="Conference on Empirical Methods in Natural Language Processing",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma < 0:
            raise ValueError(f"gamma {self.gamma} is negative; 0 switches it off")

    @property
    def strength(self) -> float:
        return self.scale

    def choosable(self, m: int, n: int) -> int:
        return min(m, n) - self._rank

    def start(self, w: Tensor, given: Given) -> Tensors:
        *_, m, n = w.shape
        q = min(m, n) - self._rank
        u, s, vh = truncated_svd(w, min(m, n), self.driver, seed=given.seed, where=given.name)
        tensors = {"L": u[..., q:].clone(), "C": s[..., q:].clone(), "A": vh[..., q:, :].clone()}
        return tensors | self.choice(u[..., :q].clone(), s[..., :q].clone(), vh[..., :q, :].clone())

    def penalty(self, sites: Sequence[Factors]) -> Tensor | None:
        return self.gamma * errors(sites).mean() if self.gamma else None

    def count(self, batch: int, m: int, n: int) -> int:
        """r (m + n + 1) + k per matrix."""
        return batch * (self._rank * (m + n + 1) + self.directions)
