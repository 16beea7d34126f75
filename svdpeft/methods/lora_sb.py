"""LoRA-SB: train a core between the bases of a first step of full fine-tuning, from that step on.

    W' = W0 + L C A        D = −η sign(G) ≈ U_r Σ_r V_rᵀ    L = U_r    A = V_rᵀ    C = Σ_r at the start, r×r

G = ∂loss/∂W is the mean over a few batches; D is what the first step of Adam would be. Nothing is subtracted: the start
is the base model after the part of that step which rank r holds.

K. Ponkshe, R. Singhal, E. Gorbunov, A. Tumanov, S. Horvath, P. Vepakomma.
Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning.
arXiv:2411.19557.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.decomposition import truncated_svd
from svdpeft.methods.base import Decomposed, Given, Reference, Tensors, Unscaled
from svdpeft.registry import METHODS


@METHODS.register("lora-sb")
@dataclass(frozen=True)
class LoRASB(Decomposed, Unscaled):
    """LoRA-XS between the directions that a fine-tuning takes first, and not those of the weight.

    When to use:
        Where r² values per weight must do and data for a few gradients are at hand: what LoRA-XS cannot reach, because
        it lies outside of the weight's leading directions, is in these bases. With orthonormal L and A the gradient of
        C is the best projection of G, so there is no scale to tune. Ranks are large (96), the rate 1e-4 to 2e-3.
        Signs that agree in every row make a step of a lower rank than the gradient's: fixed directions fill it up.

    Paper and code:
        The code finds η from its schedule, lr/(warm-up · steps): about 1e-4 for 50 examples at the published settings.
        The code's SVD is a sketch of size r with 10 iterations, cast to bfloat16; here it is the library's own.

    Args:
        eta: η, the size of the first step's entries.

    Example:
        >>> model, data = nn.Sequential(nn.Linear(6, 4)), [torch.randn(20, 6)]
        >>> seen = svdpeft.calibrate(model, data, gradients=True, loss=lambda out, batch: out.square().mean())
        >>> svdpeft.attach(model, LoRASB(rank=2), calibration=seen).trainable_count
        4
    """

    rank: int | dict[str, int] | None = 96
    eta: float = 1e-4

    trains: ClassVar = ("C",)
    anchored: ClassVar[bool] = False
    exact_start: ClassVar[bool] = False
    needs: ClassVar = "gradients"
    learning_rates: ClassVar = {"vision": 1e-3, "language": 1e-3}
    latex: ClassVar[str] = (
        r"W' = W_0 + U_r\,C\,V_r^\top,\qquad -\eta\,\mathrm{sign}(G) = U \Sigma V^\top,\quad C_0 = \Sigma_r"
    )
    reference: ClassVar = Reference(
        key="ponkshe2024lorasb",
        authors="Ponkshe, Kaustubh and Singhal, Raghav and Gorbunov, Eduard and Tumanov, Alexey and Horvath, Samuel "
        "and Vepakomma, Praneeth",
        title="Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank "
        "Fine-Tuning",
        year=2024,
        arxiv="2411.19557",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.eta < math.inf:
            raise ValueError(f"eta {self.eta} is outside (0, inf)")

    def start(self, w: Tensor, given: Given) -> Tensors:
        step = -self.eta * given.seen("gradient", "LoRASB").to(w.device).sign()
        where = f"the gradient of {given.name}"
        u, s, vh = truncated_svd(step, self._rank, self.driver, seed=given.seed, where=where)
        return {"L": u.to(w), "C": torch.diag_embed(s).to(w), "A": vh.to(w)}

    def count(self, batch: int, m: int, n: int) -> int:
        """r² per matrix."""
        return batch * self._rank**2
