"""SORSA: train the principal singular triplets apart, and keep both bases near orthonormal.

    W' = W0 + s(L diag(C) A − L₀ diag(C₀) A₀)        L₀ = U_r    C₀ = σ_r    A₀ = V_rᵀ    s = 1, or α/r
    L_reg = ‖LᵀL − I‖_F + ‖AAᵀ − I‖_F        after each step:  L ← L − γ_t ∂L_reg/∂L,  γ_t = γ · lr_t / lr_peak

Y. Cao, Z. Song. SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language
Models. arXiv:2409.00055.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdpeft.factors import Factors, Given, Progress, Tensors
from svdpeft.methods.base import Decomposed, Reference, by_shape
from svdpeft.registry import METHODS

MODES = ("decoupled", "gradient", "loss", "retract")
NORMS = ("frobenius", "squared")


@METHODS.register("sorsa")
@dataclass(frozen=True)
class SORSA(Decomposed):
    """Singular values and singular vectors train as three factors under an orthonormal regulariser.

    Args:
        rank: r, or a mapping from site pattern to r.
        alpha: α of s = α/r; ``None`` is s = 1, as published. σ is never divided by s.
        dropout: on the adapter's input.
        gamma: γ, strength of the regulariser; 0 switches it off.
        mode: where the regulariser acts. ``"decoupled"``: on the factors after the optimizer's step, as in the
            paper, independent of Adam's state, weight decay and gradient accumulation. ``"gradient"``: the official
            code, γ/lr_peak times the mean over all factors, added to the clipped gradients. ``"loss"``: γ L_reg in
            the loss. ``"retract"``: a polar step back onto orthonormal bases after each step; γ is not used.
        norm: ``"frobenius"`` (un-squared, as in the paper) or ``"squared"`` (vanishes smoothly).
        driver: of the decomposition.
    """

    rank: int | dict[str, int] | None = 4
    gamma: float = 4e-4
    mode: Literal["decoupled", "gradient", "loss", "retract"] = "decoupled"
    norm: Literal["frobenius", "squared"] = "frobenius"

    trains: ClassVar = ("L", "C", "A")
    reference: ClassVar = Reference(
        key="cao2024sorsa",
        authors="Cao, Yang and Song, Zhao",
        title="SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models",
        year=2024,
        arxiv="2409.00055",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is not one of {', '.join(MODES)}")
        if self.norm not in NORMS:
            raise ValueError(f"norm {self.norm!r} is not one of {', '.join(NORMS)}")
        if self.gamma < 0:
            raise ValueError(f"gamma {self.gamma} is negative")

    def start(self, w: Tensor, given: Given) -> Tensors:
        u, s, vh = self.svd(w, given)
        return {"L": u, "C": s, "A": vh}

    def count(self, batch: int, m: int, n: int) -> int:
        """r (m + n + 1) per matrix."""
        return batch * self._rank * (m + n + 1)

    def penalty(self, sites: Sequence[Factors]) -> Tensor | None:
        if self.mode != "loss" or self.gamma == 0:
            return None
        q = bases(sites)
        errors = [orthonormality_error(torch.stack([q[i] for i in group]), self.norm).sum() for group in by_shape(q)]
        return self.gamma * torch.stack(errors).sum()

    @property
    def changes_gradients(self) -> bool:
        return self.mode == "gradient" and self.gamma > 0

    @torch.no_grad()
    def before_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        if self.changes_gradients:
            weight = self.gamma / progress.peak_lr / (2 * len(sites))  # the official code averages over every factor
            self._add(sites, weight, bases(sites, gradient))

    @torch.no_grad()
    def after_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        if self.mode == "decoupled" and self.gamma > 0:
            self._add(sites, -self.gamma * progress.lr_scale, bases(sites))
        elif self.mode == "retract":
            q = bases(sites)
            for group in by_shape(q):
                for i, nearest in zip(group, polar(torch.stack([q[i] for i in group])), strict=True):
                    q[i].copy_(nearest)

    def _add(self, sites: Sequence[Factors], weight: float, targets: list[Tensor]) -> None:
        """Add ``weight · ∂L_reg`` of every basis to its target, one batched call per shape."""
        q = bases(sites)
        for group in by_shape(q):
            step = orthonormality_gradient(torch.stack([q[i] for i in group]), self.norm)
            torch._foreach_add_([targets[i] for i in group], list(step.unbind()), alpha=weight)


def bases(sites: Sequence[Factors], of: Callable[[Tensor], Tensor] = lambda p: p) -> list[Tensor]:
    """Both bases of every site with their vectors as columns: L (*b, m, r) and Aᵀ (*b, n, r), as views."""
    return [q for f in sites for q in (of(f.L), of(f.A).mT)]


def gradient(p: Tensor) -> Tensor:
    """The gradient of ``p``, made of zeros where the loss did not reach it."""
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    return p.grad


def orthonormality_error(q: Tensor, norm: str = "frobenius") -> Tensor:
    """Return ‖QᵀQ − I‖_F, or its square, of each basis.

    Args:
        q: bases with their vectors as columns, (*b, m, r).
        norm: ``"frobenius"`` or ``"squared"``.

    Returns:
        The errors, (*b,); exactly zero (and so without a gradient) below the rounding noise of the dtype.

    Example:
        >>> orthonormality_error(torch.tensor([[2.0], [0.0]]))
        tensor(3.)
    """
    error = torch.linalg.matrix_norm(_gram_error(q))
    error = torch.where(error > noise(q), error, torch.zeros_like(error))
    return error.square() if norm == "squared" else error


def orthonormality_gradient(q: Tensor, norm: str = "frobenius") -> Tensor:
    """Return the gradient of ``orthonormality_error`` in closed form, without an autograd graph.

    ∂‖E‖_F = 2 Q E / ‖E‖_F        ∂‖E‖_F² = 4 Q E        E = QᵀQ − I
    """
    e = _gram_error(q)
    size = torch.linalg.matrix_norm(e)[..., None, None]  # (*b, 1, 1)
    slope = torch.full_like(size, 4.0) if norm == "squared" else 2.0 / size
    return torch.where(size > noise(q), slope, torch.zeros_like(size)) * (q @ e)


def noise(q: Tensor) -> float:
    """‖QᵀQ − I‖_F of a basis that is orthonormal up to rounding: below this the direction means nothing."""
    return 10 * q.shape[-1] * torch.finfo(q.dtype).eps


def polar(q: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns, U Vᵀ of Q = U Σ Vᵀ, (*b, m, r)."""
    u, _, vh = torch.linalg.svd(q, full_matrices=False)
    return u @ vh


def _gram_error(q: Tensor) -> Tensor:
    return q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
