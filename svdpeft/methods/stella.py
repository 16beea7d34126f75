"""StelLA: a three-factor adapter whose two bases move on their Stiefel manifolds.

    W' = W0 + s(L C A − L₀ C₀ A₀)        L₀, A₀ᵀ orthonormal, drawn    C₀ = I, r×r    s = α/r
    for X = L and X = Aᵀ with ∂X:  ∂X ← ∂X − X ∂Xᵀ X;  the optimizer moves X to X + Δ
        Δ ← Δ − X sym(XᵀΔ);  X ← polar(X + Δ) = (X + Δ)(I + ΔᵀΔ)^−½

Z. Li, S. Sajadmanesh, J. Li, L. Lyu. StelLA: Subspace Learning in Low-rank Adaptation using Stiefel Manifold.
NeurIPS 2025, arXiv:2510.01938.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.decomposition.orthonormality import polar
from svdpeft.methods.base import Factors, Given, Progress, Reference, Scaled, Tensors, by_shape, generator
from svdpeft.methods.base.bases import bases
from svdpeft.methods.base.drawn import orthonormal
from svdpeft.registry import METHODS

HERE = ("L here", "A here")  # in a site's memory, from before a step to after it: where on the manifold it began


@METHODS.register("stella")
@dataclass(frozen=True)
class StelLA(Scaled):
    """Orthonormal bases, kept exactly so by a retraction after each step of any optimizer.

    When to use:
        Where the subspaces are to be learned apart from the strengths, as with SORSA, but from a random start and with
        bases that are orthonormal to rounding at every step. The paper trains rank 32 with α = 64 at 5e-4. Weight decay
        of the bases has no effect beyond the step's direction: they are put back.

    Paper and code:
        The published start is off the base model by s L₀ A₀, of norm s in every weight. Here the start is subtracted,
        so that it is the base model; such an adapter is a LoRA of rank 2r.
        The code divides steps by √(size of the basis / hidden size) where the two differ; here Δ is as the optimizer
        makes it. Its exponential map, its diagonal core and its starts from the SVD (SORSA's, with
        ``SORSA(mode="retract")``) are not offered.

    Args:
        alpha: α of s = α/r; ``None`` is α = r.

    Example:
        >>> StelLA(rank=8).count(1, 30, 20)  # 8 · (50 + 8)
        464
    """

    trains: ClassVar = ("L", "C", "A")
    draws: ClassVar = True
    learning_rates: ClassVar = {"vision": 3e-3, "language": 5e-4}
    changes_gradients: ClassVar[bool] = True  # type: ignore[assignment]
    latex: ClassVar[str] = r"W' = W_0 + s\,(L\,C A - L_0 A_0),\qquad L^\top L = A A^\top = I \text{ at every step}"
    reference: ClassVar = Reference(
        key="li2025stella",
        authors="Li, Zhizhong and Sajadmanesh, Sina and Li, Jingtao and Lyu, Lingjuan",
        title="StelLA: Subspace Learning in Low-rank Adaptation using Stiefel Manifold",
        year=2025,
        venue="Advances in Neural Information Processing Systems",
        arxiv="2510.01938",
    )

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        source, r = generator(given.seed), self._rank
        left, right = (orthonormal(*batch, size, r, source=source).to(w) for size in (m, n))
        core = torch.eye(r, dtype=w.dtype, device=w.device).expand(*batch, r, r)
        return {"L": left, "C": core.clone(), "A": right.mT}

    def count(self, batch: int, m: int, n: int) -> int:
        """r (m + n + r) per matrix."""
        return batch * self._rank * (m + n + self._rank)

    @torch.no_grad()
    def before_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        for f in sites:
            f.memory.update(zip(HERE, (f.L.detach().clone(), f.A.detach().clone()), strict=True))
        reached = [f for f in sites if f.L.grad is not None and f.A.grad is not None]
        q, slopes = bases(reached), bases(reached, lambda p: p.grad)  # type: ignore[arg-type, return-value]
        for group in by_shape(q):
            x, g = (torch.stack([each[i] for i in group]) for each in (q, slopes))
            torch._foreach_copy_([slopes[i] for i in group], list((g - x @ (g.mT @ x)).unbind()))

    @torch.no_grad()
    def after_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        q = bases(sites)
        start = [x for f in sites for x in (f.memory.pop(HERE[0], f.L), f.memory.pop(HERE[1], f.A).to(f.A).mT)]
        for group in by_shape(q):
            x, moved = (torch.stack([each[i] for i in group]) for each in (start, q))
            step = x.mT @ (moved - x)
            tangent = moved - x - x @ ((step + step.mT) / 2)
            torch._foreach_copy_([q[i] for i in group], list(polar(x + tangent).unbind()))
