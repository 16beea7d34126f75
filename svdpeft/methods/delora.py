"""DeLoRA: the angles and the strength of an update apart, with a bound on how far the weight can move.

    W' = W0 + D − D₀        D = (λ/r) Σᵢ lᵢ aᵢ diag(w) / (‖lᵢ‖‖aᵢ‖)        w_j = ‖W0[:, j]‖

lᵢ are the columns of L, aᵢ the rows of A; both start as U(−1/√·, 1/√·), and D₀ is what D is then.

M. Bini, L. Girrbach, Z. Akata. Decoupling Angles and Strength in Low-rank Adaptation. ICLR 2025, arXiv:2503.18225.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from svdpeft.decomposition import Product
from svdpeft.methods.base import Factors, Given, Reference, Tensors, Unscaled, generator
from svdpeft.methods.base.drawn import kaiming
from svdpeft.registry import METHODS

SMALLEST = 1e-4  # a norm that a direction is divided by, as in PEFT


@METHODS.register("delora")
@dataclass(frozen=True)
class DeLoRA(Unscaled):
    """Directions of length one whose common strength is a single trained number.

    When to use:
        Where a large learning rate or a long training must not carry the model away: the update of a weight is bounded
        by λ and the norms of its columns, whatever the factors become. λ is the hyper-parameter that counts (4 to 12 in
        the paper, 15 in PEFT).

    Paper and code:
        The paper scales by ‖W‖, its code by the norm of each column, which is what is here.
        The code subtracts the start with the λ of today, so that the start moves with λ; here D₀ is a constant.
        PEFT starts at L = 0 with norms of at least 1e-4, so that the first gradients of L are 10⁴ times as large; not
        offered.

    Args:
        strength: λ at the start.

    Example:
        >>> DeLoRA(rank=8).count(1, 30, 20)  # 8 · 50 + 1
        401
    """

    strength: float = 8.0

    trains: ClassVar = ("L", "A", "strength")
    draws: ClassVar = True
    learning_rates: ClassVar = {"vision": 1e-2, "language": 3e-3}
    latex: ClassVar[str] = (
        r"W' = W_0 + D - D_0,\qquad D = \tfrac{\lambda}{r} \sum_i \frac{l_i a_i}{\|l_i\|\|a_i\|}\,"
        r"\mathrm{diag}(\|W_{0,:j}\|)"
    )
    reference: ClassVar = Reference(
        key="bini2025delora",
        authors="Bini, Massimo and Girrbach, Leander and Akata, Zeynep",
        title="Decoupling Angles and Strength in Low-rank Adaptation",
        year=2025,
        venue="International Conference on Learning Representations",
        arxiv="2503.18225",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.strength < math.inf:
            raise ValueError(f"strength {self.strength} is outside (0, inf)")

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        source, r = generator(given.seed), self._rank
        left, right = (kaiming(*batch, *shape, source=source).to(w) for shape in ((m, r), (r, n)))
        strength = w.new_full((*batch, 1), self.strength)
        return {"L": left, "A": right, "strength": strength, "strength0": strength.clone(), "w": w.norm(dim=-2)}

    def tensor_names(self) -> list[str]:
        return [*super().tensor_names(), "strength0", "w"]

    def count(self, batch: int, m: int, n: int) -> int:
        """r (m + n) + 1 per matrix."""
        return batch * (self._rank * (m + n) + 1)

    def now(self, f: Factors) -> Product:
        return _product(f.L, f.A, f.strength, f.w)

    def anchor(self, f: Factors) -> Product:
        return _product(f.L0, f.A0, f.strength0, f.w)


def _product(left: Tensor, right: Tensor, strength: Tensor, w: Tensor) -> Product:
    norms = left.norm(dim=-2).clamp(min=SMALLEST) * right.norm(dim=-1).clamp(min=SMALLEST)
    return Product(left, strength / (left.shape[-1] * norms), right * w.unsqueeze(-2))
