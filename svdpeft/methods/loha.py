"""LoHa: the entry-wise product of two low-rank matrices, whose rank is up to r².

    W' = W0 + s (L A) ∘ (L₂ A₂)        L₂ = 0, the others U(−1/√·, 1/√·)    s = α/r

    (L A) ∘ (L₂ A₂) = (L ⊙ L₂)(A ⊙ A₂), rows of L and L₂ and columns of A and A₂ multiplied by Kronecker

N. Hyeon-Woo, M. Ye-Bin, T.-H. Oh. FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning.
ICLR 2022, arXiv:2108.06098. As an adapter: S.-Y. Yeh and others (LyCORIS), ICLR 2024, arXiv:2309.14859.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from svdpeft.decomposition import Product
from svdpeft.methods.base import Factors, Given, Reference, Scaled, Tensors, generator
from svdpeft.methods.base.drawn import kaiming
from svdpeft.registry import METHODS


@METHODS.register("loha")
@dataclass(frozen=True)
class LoHa(Scaled):
    """Twice the values of LoRA for a square of its rank.

    When to use:
        Where an update of a larger rank is wanted at a small budget. The four factors multiply, so the update is small
        for small factors and learns slowly at first. An adapter is a LoRA of rank r², exactly.

    Paper and code:
        PEFT starts with the second right factor at zero, LyCORIS with the second left one; here it is the latter, which
        leaves the same function in reach. Tensors of a convolution in Tucker form are not offered: a kernel is one
        matrix, as everywhere here.

    Args:
        alpha: α of s = α/r; ``None`` is α = r.

    Example:
        >>> LoHa(rank=4).count(1, 30, 20), LoHa(rank=4).at("fc", 30, 20).export_rank(30, 20)
        (400, 16)
    """

    trains: ClassVar = ("L", "A", "L2", "A2")
    anchored: ClassVar[bool] = False
    draws: ClassVar = True
    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    latex: ClassVar[str] = r"W' = W_0 + s\,(L A) \circ (L_2 A_2),\qquad L_{2} = 0 \text{ at the start}"
    reference: ClassVar = Reference(
        key="hyeonwoo2022fedpara",
        authors="Hyeon-Woo, Nam and Ye-Bin, Moon and Oh, Tae-Hyun",
        title="FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
        year=2022,
        venue="International Conference on Learning Representations",
        arxiv="2108.06098",
    )

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        source, r = generator(given.seed), self._rank
        left, right, second = (kaiming(*batch, *shape, source=source).to(w) for shape in ((m, r), (r, n), (r, n)))
        return {"L": left, "A": right, "L2": w.new_zeros(*batch, m, r), "A2": second}

    def export_rank(self, m: int, n: int) -> int:
        return min(self._rank**2, m, n)

    def count(self, batch: int, m: int, n: int) -> int:
        """2r (m + n) per matrix."""
        return 2 * batch * self._rank * (m + n)

    def now(self, f: Factors) -> Product:
        left = (f.L.unsqueeze(-1) * f.L2.unsqueeze(-2)).flatten(-2)  # (*b, m, r²)
        right = (f.A.unsqueeze(-2) * f.A2.unsqueeze(-3)).flatten(-3, -2)  # (*b, r², n)
        return Product(left, None, right, self.scale)
