"""LoKr: the Kronecker product of a small matrix and a low-rank one.

    W' = W0 + s C ⊗ (L A)        C = 0, (p, q)    L (m/p, r), A (r, n/q) ~ U(−1/√·, 1/√·)    s = α/r

    C ⊗ (L A) = (I_p ⊗ L)(C ⊗ A), of rank p r, or (C ⊗ L)(I_q ⊗ A), of rank q r: the smaller one is computed with

S.-Y. Yeh, Y.-G. Hsieh, Z. Gao, B. B. W. Yang, G. Oh, Y. Gong. Navigating Text-To-Image Customization: From LyCORIS
Fine-Tuning to Model Evaluation. ICLR 2024, arXiv:2309.14859.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.decomposition import Product
from svdpeft.methods.base import Factors, Given, Reference, Scaled, Tensors, generator
from svdpeft.methods.base.drawn import kaiming
from svdpeft.registry import METHODS


@METHODS.register("lokr")
@dataclass(frozen=True)
class LoKr(Scaled):
    """One small pattern, repeated over the weight with a strength for each block.

    When to use:
        Where very few values per weight are wanted with an update of a large rank: p q + r (m/p + n/q). Made for
        diffusion models.

    Paper and code:
        As in PEFT, C is the factor that starts at zero, and s = α/r; LyCORIS starts the other one at zero
        (``init_weights="lycoris"`` there), and has s = 1 where the right block is a full matrix. A full right block,
        which PEFT takes where r is at least half of it, and a C of two factors are not offered.
        A number of rows without divisors is not cut: p = 1.

    Args:
        alpha: α of s = α/r; ``None`` is α = r.
        factor: p is the largest divisor of m of at most this, and of at most √m; so is q of n. −1 is √m and √n.

    Example:
        >>> LoKr(rank=4).count(1, 4096, 4096)  # 64 · 64 + 4 · (64 + 64)
        4608
    """

    factor: int = -1

    trains: ClassVar = ("L", "C", "A")
    anchored: ClassVar[bool] = False
    draws: ClassVar = True
    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    latex: ClassVar[str] = r"W' = W_0 + s\,C \otimes (L A),\qquad C_0 = 0"
    reference: ClassVar = Reference(
        key="yeh2024lycoris",
        authors="Yeh, Shih-Ying and Hsieh, Yu-Guan and Gao, Zhidong and Yang, Bernard B W and Oh, Giyeong and Gong, "
        "Yanmin",
        title="Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
        year=2024,
        venue="International Conference on Learning Representations",
        arxiv="2309.14859",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor != -1 and self.factor < 1:
            raise ValueError(f"factor {self.factor} is neither -1 nor at least 1")

    def split(self, size: int) -> int:
        """p of m rows, or q of n columns."""
        most = int(size**0.5) if self.factor == -1 else min(self.factor, int(size**0.5))
        return next(d for d in range(max(most, 1), 0, -1) if size % d == 0)

    def rank_limit(self, m: int, n: int) -> int:
        return min(m // self.split(m), n // self.split(n))

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        p, q, r, source = self.split(m), self.split(n), self._rank, generator(given.seed)
        left, right = (kaiming(*batch, *shape, source=source).to(w) for shape in ((m // p, r), (r, n // q)))
        return {"L": left, "C": w.new_zeros(*batch, p, q), "A": right}

    def export_rank(self, m: int, n: int) -> int:
        return min(min(self.split(m), self.split(n)) * self._rank, m, n)

    def count(self, batch: int, m: int, n: int) -> int:
        """p q + r (m/p + n/q) per matrix."""
        p, q = self.split(m), self.split(n)
        return batch * (p * q + self._rank * (m // p + n // q))

    def now(self, f: Factors) -> Product:
        p, q = f.C.shape[-2:]
        if p <= q:
            return Product(_kron(_eye(p, f.L), f.L), None, _kron(f.C, f.A), self.scale)
        return Product(_kron(f.C, f.L), None, _kron(_eye(q, f.A), f.A), self.scale)


def _kron(a: Tensor, b: Tensor) -> Tensor:
    """a ⊗ b of each matrix of a batch."""
    product = a[..., :, None, :, None] * b[..., None, :, None, :]
    return product.flatten(-4, -3).flatten(-2)


def _eye(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device).expand(*like.shape[:-2], size, size)
