"""LoRA-FA: LoRA with its A frozen, and a step that does not depend on how A was drawn.

    W' = W0 + L A        L = 0    A ~ U(−1/√n, 1/√n), frozen
    before each step:  ∂L ← ∂L (A Aᵀ)⁻¹

So W0 follows the projection of its gradient G on the rows of A: ∂L A = G Aᵀ(A Aᵀ)⁻¹A.

L. Zhang, L. Zhang, S. Shi, X. Chu, B. Li. LoRA-FA: Efficient and Effective Low Rank Representation Fine-tuning.
arXiv:2308.03303.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.methods.base import Factors, Given, Progress, Reference, Tensors, Unscaled, by_shape, generator
from svdpeft.methods.base.drawn import kaiming
from svdpeft.registry import METHODS

STABILISER = 1e-8  # of the code, added to A Aᵀ


@METHODS.register("lora-fa")
@dataclass(frozen=True)
class LoRAFA(Unscaled):
    """Half of LoRA's values, and no input of a layer is kept for the gradient of A.

    When to use:
        Where the memory of activations is what limits a training: of each layer's input only A x, r numbers per token,
        is needed for L. The update stays in the rows of A, which are random, so the rank wants to be larger than
        LoRA's.

    Paper and code:
        The scale s = α/r is left out: A is frozen, and s only multiplies the learning rate (of the corrected gradient
        the paper divides by s²).
        The first version of the paper has no correction: ``corrects=False``.
        PEFT's optimizer pairs parameters by their order and decays weights after the step; here the correction is the
        method's, and any optimizer steps.

    Args:
        corrects: whether gradients are multiplied by (A Aᵀ)⁻¹.

    Example:
        >>> LoRAFA(rank=16).count(1, 30, 20)
        480
    """

    rank: int | dict[str, int] | None = 16
    corrects: bool = True

    trains: ClassVar = ("L",)
    anchored: ClassVar[bool] = False
    draws: ClassVar = True
    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    latex: ClassVar[str] = r"W' = W_0 + L A,\qquad L_0 = 0,\quad \nabla_L \leftarrow \nabla_L\,(A A^\top)^{-1}"
    reference: ClassVar = Reference(
        key="zhang2023lorafa",
        authors="Zhang, Longteng and Zhang, Lin and Shi, Shaohuai and Chu, Xiaowen and Li, Bo",
        title="LoRA-FA: Efficient and Effective Low Rank Representation Fine-tuning",
        year=2023,
        arxiv="2308.03303",
    )

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        a = kaiming(*batch, self._rank, n, source=generator(given.seed))
        return {"L": w.new_zeros(*batch, m, self._rank), "A": a.to(w)}

    @property
    def changes_gradients(self) -> bool:
        return self.corrects

    @property
    def has_step(self) -> bool:
        return self.corrects

    @torch.no_grad()
    def before_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        if not self.corrects:
            return
        reached = [f for f in sites if f.L.grad is not None]
        for group in by_shape([f.A for f in reached]):
            a = torch.stack([reached[i].A for i in group])
            gram = a @ a.mT + STABILISER * torch.eye(a.shape[-2], dtype=a.dtype, device=a.device)
            for i, inverse in zip(group, torch.linalg.inv(gram), strict=True):
                gradient = reached[i].L.grad
                assert gradient is not None
                gradient.copy_(gradient @ inverse)
