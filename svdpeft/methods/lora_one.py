"""LoRA-One: LoRA that starts at one small step of full gradient descent.

    W' = W0 + s L A        −G = U Σ Vᵀ    L₀ = U_r √(Σ_r/σ₁)/√γ    A₀ = √(Σ_r/σ₁) V_rᵀ/√γ    s = α/√r

G = ∂loss/∂W is the mean over a few batches. Nothing is subtracted: the start is the base model after a step of
norm s/γ.

Y. Zhang, F. Liu, Y. Chen. LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models,
Provably and Efficiently. ICML 2025, arXiv:2502.01235.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from svdpeft.decomposition import SVD
from svdpeft.methods.base import Decomposed, Given, Reference, Scaled, Tensors
from svdpeft.methods.base.directions import leading
from svdpeft.registry import METHODS


@METHODS.register("lora-one")
@dataclass(frozen=True)
class LoRAOne(Decomposed, Scaled):
    """The step that LoRA-GA prepares is taken at the start, and both factors are aligned with it.

    When to use:
        Where training is short and a few batches of its data give gradients (8 examples in the published runs). The
        start differs from the base model by little, in every weight by the same norm, whatever the gradient's size.
        An adapter is a LoRA of rank r: nothing is subtracted. A gradient of
        lower rank, of too few examples, is an error.

    Paper and code:
        The published README has Σ_r whole in both factors; the code divides by σ₁ and takes roots, which is what is
        here. The preconditioned optimizer of the paper is not part of the method, and goes with it:
        ``gradients="riemannian"``.
        The code decomposes by a sketch of 512 columns and 16 iterations; here it is the library's own.

    Args:
        alpha: α; the paper's is 16, ``None`` is α = r.
        rs: scale α/√r, the paper's, instead of α/r.
        gamma: γ; larger is a smaller start.

    Example:
        >>> model, data = nn.Sequential(nn.Linear(6, 4)), [torch.randn(20, 6)]
        >>> seen = svdpeft.calibrate(model, data, gradients=True, loss=lambda out, batch: out.square().mean())
        >>> svdpeft.attach(model, LoRAOne(rank=2), calibration=seen).trainable_count
        20
    """

    alpha: float | None = 16.0
    rs: bool = True
    gamma: float = 128.0

    anchored: ClassVar[bool] = False
    exact_start: ClassVar[bool] = False
    needs: ClassVar = "gradients"
    learning_rates: ClassVar = {"vision": 3e-3, "language": 2e-4}
    latex: ClassVar[str] = (
        r"W' = W_0 + s\,L A,\quad -G = U \Sigma V^\top,\quad "
        r"L_0 = U_r \sqrt{\Sigma_r / (\gamma\sigma_1)},\quad A_0 = \sqrt{\Sigma_r / (\gamma\sigma_1)}\, V_r^\top"
    )
    reference: ClassVar = Reference(
        key="zhang2025loraone",
        authors="Zhang, Yuanhe and Liu, Fanghui and Chen, Yudong",
        title="LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models, Provably and "
        "Efficiently",
        year=2025,
        venue="International Conference on Machine Learning",
        arxiv="2502.01235",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.gamma < math.inf:
            raise ValueError(f"gamma {self.gamma} is outside (0, inf)")

    def start(self, w: Tensor, given: Given) -> Tensors:
        g = given.seen("gradient", "LoRAOne").to(w.device)
        u, s, vh = leading(-g, given, "LoRAOne", self.driver, least=self._rank, most=self._rank)
        left, right = SVD(u, s / (self.gamma * s[..., :1]), vh).balanced()
        return {"L": left.to(w), "A": right.to(w)}
