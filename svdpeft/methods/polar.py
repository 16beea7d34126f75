"""PoLAR: directions that stay near the Stiefel manifolds by a landing field, and a free core between them.

    W' = W0 + s L C A        L, Aᵀ orthonormal    C = 0, r×r    s = α/r
    before each step, for P = L and P = Aᵀ:  ∂P ← ∂P PᵀP − P ∂PᵀP + λ P(PᵀP − I)

K. Lion, L. Zhang, B. Li, N. He. PoLAR: Polar-Decomposed Low-Rank Adapter Representation. arXiv:2506.03133.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.methods.base import Factors, Given, Progress, Reference, Scaled, Tensors, by_shape, generator
from svdpeft.methods.base.bases import bases
from svdpeft.methods.base.drawn import orthonormal
from svdpeft.registry import METHODS


@METHODS.register("polar")
@dataclass(frozen=True)
class PoLAR(Scaled):
    """Directions of length one and a core for their strengths, without a retraction.

    When to use:
        Where LoRA uses far fewer directions than its rank: with orthonormal factors the core alone says how much each
        has, and the learning rate can be ten times LoRA's (4e-3 against 4e-4 in the paper's runs, with α = 32). The
        first step moves C alone.

    Paper and code:
        The paper takes the skew part with ½, its code without; so λ is relative to twice the paper's field. The code
        builds m×m and n×n matrices; here the same field is found by r×r ones.
        The code's ``euclidean`` field, and cores that are diagonal or left out, are not offered.

    Args:
        alpha: α of s = α/r; ``None`` is α = r.
        landing: λ, how strongly factors are drawn to the manifold; through the optimizer, so no rate of decay.

    Example:
        >>> PoLAR(rank=8).count(1, 30, 20)  # 8 · (50 + 8)
        464
    """

    alpha: float | None = 32.0
    landing: float = 5e-3

    trains: ClassVar = ("L", "C", "A")
    anchored: ClassVar[bool] = False
    draws: ClassVar = True
    learning_rates: ClassVar = {"vision": 1e-2, "language": 4e-3}
    changes_gradients: ClassVar[bool] = True  # type: ignore[assignment]
    latex: ClassVar[str] = r"W' = W_0 + s\,L\,C A,\qquad C_0 = 0,\quad L^\top L = A A^\top = I \text{ at the start}"
    reference: ClassVar = Reference(
        key="lion2025polar",
        authors="Lion, Kai and Zhang, Liang and Li, Bingcong and He, Niao",
        title="PoLAR: Polar-Decomposed Low-Rank Adapter Representation",
        year=2025,
        arxiv="2506.03133",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.landing < math.inf:
            raise ValueError(f"landing {self.landing} is outside [0, inf)")

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        source, r = generator(given.seed), self._rank
        left, right = (orthonormal(*batch, size, r, source=source).to(w) for size in (m, n))
        return {"L": left, "C": w.new_zeros(*batch, r, r), "A": right.mT}

    def count(self, batch: int, m: int, n: int) -> int:
        """r (m + n + r) per matrix."""
        return batch * self._rank * (m + n + self._rank)

    @torch.no_grad()
    def before_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        reached = [f for f in sites if f.L.grad is not None and f.A.grad is not None]
        q, slopes = bases(reached), bases(reached, lambda p: p.grad)  # type: ignore[arg-type, return-value]
        for group in by_shape(q):
            p, g = (torch.stack([each[i] for i in group]) for each in (q, slopes))
            gram = p.mT @ p
            off = gram - torch.eye(gram.shape[-1], dtype=p.dtype, device=p.device)
            field = g @ gram - p @ (g.mT @ p) + self.landing * (p @ off)
            torch._foreach_copy_([slopes[i] for i in group], list(field.unbind()))
