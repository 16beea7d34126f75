"""MoSLoRA: a trained r×r mixer between the two factors of LoRA.

    W' = W0 + s L C A        L = 0    C ~ U(−1/√r, 1/√r), r×r    A ~ U(−1/√n, 1/√n)    s = α/r

T. Wu, J. Wang, Z. Zhao, N. Wong. Mixture-of-Subspaces in Low-Rank Adaptation. EMNLP 2024, arXiv:2406.11909.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from svdpeft.methods.base import Given, Reference, Scaled, Tensors, generator
from svdpeft.methods.base.drawn import kaiming
from svdpeft.registry import METHODS


@METHODS.register("moslora")
@dataclass(frozen=True)
class MoSLoRA(Scaled):
    """LoRA in which every column of L meets every row of A.

    When to use:
        Where LoRA is used and r² more values per weight do not matter. It reaches the same updates as a LoRA of the
        same rank, by another way: what it can gain is speed of training. The paper trains rank 16 with α = 32 at a
        learning rate of 3e-4.

    Paper and code:
        The code's comments name other starts of the mixer, orthogonal and identity among them; not offered. The SLoRA
        of NLoRA's authors is the same method.

    Args:
        alpha: α of s = α/r; ``None`` is α = r.

    Example:
        >>> MoSLoRA(rank=16).count(1, 30, 20)  # 16 · (50 + 16)
        1056
    """

    rank: int | dict[str, int] | None = 16

    trains: ClassVar = ("L", "C", "A")
    anchored: ClassVar[bool] = False
    draws: ClassVar = True
    learning_rates: ClassVar = {"vision": 1e-2, "language": 3e-4}
    latex: ClassVar[str] = r"W' = W_0 + s\,L\,C A,\qquad L_0 = 0,\quad C \in \mathbb{R}^{r\times r}"
    reference: ClassVar = Reference(
        key="wu2024moslora",
        authors="Wu, Taiqiang and Wang, Jiahao and Zhao, Zhe and Wong, Ngai",
        title="Mixture-of-Subspaces in Low-Rank Adaptation",
        year=2024,
        venue="Conference on Empirical Methods in Natural Language Processing",
        arxiv="2406.11909",
    )

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        source, r = generator(given.seed), self._rank
        a, c = (kaiming(*batch, r, size, source=source).to(w) for size in (n, r))
        return {"L": w.new_zeros(*batch, m, r), "C": c, "A": a}

    def count(self, batch: int, m: int, n: int) -> int:
        """r (m + n + r) per matrix."""
        return batch * self._rank * (m + n + self._rank)
