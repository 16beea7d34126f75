"""SORSA: train the principal singular triplets apart, and keep both bases near orthonormal.

    W' = W0 + s(L diag(C) A − L₀ diag(C₀) A₀)        L₀ = U_r    C₀ = σ_r    A₀ = V_rᵀ    s = 1, or α/r
    L_reg = ‖LᵀL − I‖_F + ‖AAᵀ − I‖_F        after each step:  L ← L − γ_t ∂L_reg/∂L,  γ_t = γ · lr_t / lr_peak

Y. Cao, Z. Song. SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language
Models. arXiv:2409.00055.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdpeft.decomposition.orthonormality import (
    orthonormality_gradient,
    orthonormality_step,
    polar,
)
from svdpeft.methods.base import Decomposed, Factors, Given, Progress, Reference, Tensors, Triplets, by_shape
from svdpeft.methods.base.bases import bases, errors
from svdpeft.methods.base.schedules import Adaptive, Schedule, read_gamma
from svdpeft.registry import METHODS

MODES = ("decoupled", "gradient", "loss", "retract")
NORMS = ("frobenius", "squared")
GAMMA = "gamma"  # in the memory of the method's first site: γ of the next step, and what it is found from


@METHODS.register("sorsa")
@dataclass(frozen=True)
class SORSA(Decomposed, Triplets):
    """Singular values and singular vectors train as three factors under an orthonormal regulariser.

    When to use:
        When a fine-tuning should move the leading directions of a weight and keep them readable as such: singular
        values and both bases stay apart, so that what changed can be seen. As many values as LoRA and one more per
        rank, an SVD at the start, and a little time after each step. With ``gamma=0`` it is PiSSA in other
        coordinates, and a run that orthonormality does not help gains nothing over PiSSA. The published run has 1.5
        times the learning rate of its LoRA baseline: search it.

    Paper and code:
        The paper moves the bases by −γ_t ∂L_reg beside the optimizer; the official code adds γ/lr_peak times the mean
        over all factors to the gradients, so that Adam rescales it: ``mode="gradient"``.
        The official code divides that by the gradient accumulation as well; not offered.
        The author's PEFT fork adds γ times the mean to the loss; ``mode="loss"`` adds γ times the sum.
        The official code multiplies out the dense weight in every forward; here the factors stay thin.

    Args:
        alpha: α of s = α/r; ``None`` is s = 1, as published. σ is never divided by s.
        gamma: γ, strength of the regulariser; 0 switches it off. Ours: a ``Schedule`` over the training, or
            ``Adaptive``, which holds the mean of ‖QᵀQ − I‖_F over all bases at a target.
        mode: where the regulariser acts. ``"decoupled"``: on the factors after the optimizer's step, as in the
            paper, independent of Adam's state, weight decay and gradient accumulation. ``"gradient"``: the official
            code, γ/lr_peak times the mean over all factors, added to the clipped gradients. ``"loss"``: γ L_reg in
            the loss. ``"retract"``: a polar step back onto orthonormal bases after each step; γ is not used.
        norm: ``"frobenius"`` (un-squared, as in the paper) or ``"squared"`` (vanishes smoothly).
    """

    rank: int | dict[str, int] | None = 4
    gamma: float | Schedule | Adaptive = 4e-4
    mode: Literal["decoupled", "gradient", "loss", "retract"] = "decoupled"
    norm: Literal["frobenius", "squared"] = "frobenius"

    learning_rates: ClassVar = {"vision": 3e-3, "language": 2e-4}
    trains: ClassVar = ("L", "C", "A")
    pruned: ClassVar = ("L", "C", "A")
    latex: ClassVar[str] = (
        r"W' = W_0 + s\,(L\,\mathrm{diag}(C)\,A - U_r \Sigma_r V_r^\top),\quad "
        r"L_0 = U_r,\; C_0 = \sigma_r,\; A_0 = V_r^\top"
    )
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
        object.__setattr__(self, "gamma", read_gamma(self.gamma))
        if self.mode == "retract" and self._moving:
            raise ValueError(f"gamma {self.gamma}: mode 'retract' has no γ")

    @property
    def _moving(self) -> bool:
        """Whether γ is more than a number."""
        return isinstance(self.gamma, (Schedule, Adaptive))

    def start(self, w: Tensor, given: Given) -> Tensors:
        u, s, vh = self.svd(w, given)
        return {"L": u, "C": s, "A": vh}

    def penalty(self, sites: Sequence[Factors]) -> Tensor | None:
        if self.mode != "loss" or self.gamma == 0:
            return None
        return self._gamma(sites) * errors(sites, self.norm).sum()

    @property
    def changes_gradients(self) -> bool:
        return super().changes_gradients or (self.mode == "gradient" and self.gamma != 0)

    @property
    def keeps_state(self) -> bool:
        return super().keeps_state or self._moving

    @property
    def has_step(self) -> bool:
        regularised = self.mode == "retract" or (self.mode != "loss" and self.gamma != 0)
        return regularised or self.keeps_state

    @torch.no_grad()
    def before_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        super().before_step(sites, progress)
        if self.mode == "gradient" and self.gamma != 0:
            matrices = sum(f.L[..., 0, 0].numel() for f in sites)
            weight = self._gamma(sites) / progress.peak_lr / (2 * matrices)  # the code's mean over every factor
            self._add(sites, weight, bases(sites, gradient))

    @torch.no_grad()
    def after_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        if self.mode == "decoupled" and self.gamma != 0:
            self._add(sites, -self._gamma(sites) * progress.lr_scale, bases(sites))
        elif self.mode == "retract":
            q = bases(sites)
            for group in by_shape(q):
                torch._foreach_copy_([q[i] for i in group], list(polar(torch.stack([q[i] for i in group])).unbind()))
        super().after_step(sites, progress)
        if isinstance(self.gamma, (Schedule, Adaptive)):
            memory = sites[0].memory
            memory[GAMMA] = self.gamma.after(memory.get(GAMMA), progress, lambda: errors(sites).mean())

    def _gamma(self, sites: Sequence[Factors]) -> float | Tensor:
        """γ of the coming step: a number, or what the last step left."""
        if not isinstance(self.gamma, (Schedule, Adaptive)):
            return self.gamma
        return sites[0].memory[GAMMA][0] if GAMMA in sites[0].memory else self.gamma.start

    def _add(self, sites: Sequence[Factors], weight: float | Tensor, targets: list[Tensor]) -> None:
        """Add ``weight · ∂L_reg`` of every basis to its target, one batched call per shape."""
        q = bases(sites)
        for group in by_shape(q):
            stack, factor = torch.stack([q[i] for i in group]), weight
            if isinstance(factor, Tensor) and factor.is_cuda:
                factor = factor.to(stack.device)
            if self.mode == "decoupled" and isinstance(self.gamma, Adaptive):  # whatever the controller asks for
                step, factor = orthonormality_step(stack, -factor, self.norm), 1.0
            else:
                step = orthonormality_gradient(stack, self.norm)
            if isinstance(factor, Tensor):  # found on the device, and the host does not wait for it
                step, factor = step * factor, 1.0
            torch._foreach_add_([targets[i] for i in group], list(step.unbind()), alpha=factor)


def gradient(p: Tensor) -> Tensor:
    """The gradient of ``p``, made of zeros where the loss did not reach it."""
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    return p.grad
