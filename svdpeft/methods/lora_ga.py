"""LoRA-GA: factors along the gradient of the weight, so that the first step is close to that of full fine-tuning.

    W' = W0 + s(L A − L₀A₀)        G = U Σ Vᵀ    L₀ = c U[:, r:2r]    A₀ = c V[:, :r]ᵀ    c = m^¼ / √γ    s = α/√r

G = ∂loss/∂W is the mean over a few batches. Its singular values are not used.

S. Wang, L. Yu, J. Li. LoRA-GA: Low-Rank Adaptation with Gradient Approximation. NeurIPS 2024, arXiv:2407.05000.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from svdpeft.methods.base import Decomposed, Given, Reference, Scaled, Tensors
from svdpeft.methods.base.directions import leading
from svdpeft.registry import METHODS


@METHODS.register("lora-ga")
@dataclass(frozen=True)
class LoRAGA(Decomposed, Scaled):
    """LoRA whose factors start from the gradient, and on every kind of weight that has one.

    When to use:
        Where training is short and the first steps count: a few batches of the training data give the gradients. Needs
        ``svdpeft.calibrate(…, gradients=True)``, which takes the memory of one step of full fine-tuning without an
        optimizer; afterwards it costs what PiSSA costs. Of a gradient with fewer than 2r singular triplets (of a small
        matrix, or of few examples), L takes the last r of those that there are. Fewer than r are an error: what else a
        solver finds is rounding.

    Paper and code:
        PEFT multiplies L by the gradient's singular values, and scales L alone: ``variant="peft"``; with α/r as its
        scale, unless it is asked for α/√r: ``rs=False``.
        Other directions and scales of the code (A2rBr, ArBr, random; unit, weight_svd, gd_scale) are not offered.
        Both use a randomised SVD with 4 iterations; here the driver is exact for all but large matrices.

    Args:
        alpha: α; the paper's is 16, ``None`` is α = r.
        rs: scale α/√r, the paper's, instead of α/r.
        gamma: γ; larger is a smaller start.
        variant: "paper" or "peft".

    Example:
        >>> model, data = nn.Sequential(nn.Linear(6, 4)), [torch.randn(20, 6)]
        >>> seen = svdpeft.calibrate(model, data, gradients=True, loss=lambda out, batch: out.square().mean())
        >>> svdpeft.attach(model, LoRAGA(rank=2), calibration=seen).trainable_count
        20
    """

    alpha: float | None = 16.0
    rs: bool = True
    gamma: float = 16.0
    variant: Literal["paper", "peft"] = "paper"

    learning_rates: ClassVar = {"vision": 3e-3, "language": 2e-4}
    needs: ClassVar = "gradients"
    latex: ClassVar[str] = (
        r"W' = W_0 + s\,(L A - L_0 A_0),\quad G = U \Sigma V^\top,\quad "
        r"L_0 = \tfrac{\sqrt[4]{m}}{\sqrt{\gamma}}\, U_{r:2r},\quad A_0 = \tfrac{\sqrt[4]{m}}{\sqrt{\gamma}}\, V_r^\top"
    )
    reference: ClassVar = Reference(
        key="wang2024loraga",
        authors="Wang, Shaowen and Yu, Linxi and Li, Jian",
        title="LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
        year=2024,
        venue="Advances in Neural Information Processing Systems",
        arxiv="2407.05000",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma <= 0:
            raise ValueError(f"gamma {self.gamma} is not positive")
        if self.variant not in ("paper", "peft"):
            raise ValueError(f"variant {self.variant!r} is neither 'paper' nor 'peft'")

    def start(self, w: Tensor, given: Given) -> Tensors:
        g = given.seen("gradient", "LoRAGA").to(w.device)
        m = w.shape[-2]
        r = self._rank
        u, s, vh = leading(g, given, "LoRAGA", self.driver, least=r, most=2 * r)
        q = s.shape[-1]
        left, right = u[..., q - r :], vh[..., :r, :]
        c = m**0.25 / math.sqrt(self.gamma)
        if self.variant == "peft":
            return {"L": (c * left * s[..., None, q - r :]).to(w), "A": right.to(w).contiguous()}
        return {"L": (c * left).to(w), "A": (c * right).to(w)}
