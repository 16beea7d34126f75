"""OLoRA: LoRA started from the QR decomposition of the weight, its first factor orthonormal.

    W' = W0 + s(L A − L₀A₀)        W0 = Q R    L₀ = Q[:, :r]    A₀ = R[:r, :]    s = α/r

There is no pivoting: L₀ spans the first r columns of W0, whatever their size. The diagonal of R is made non-negative,
which makes the factors unique.

K. Büyükakyüz. OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models. arXiv:2406.01775.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.methods.base import Given, Reference, Tensors, Triplets
from svdpeft.registry import METHODS


@METHODS.register("olora")
@dataclass(frozen=True)
class OLoRA(Triplets):
    """LoRA whose output factor starts orthonormal and whose product starts as a part of the weight.

    When to use:
        Where a start from the weight is wanted and an SVD costs too much: a QR decomposition is several times
        cheaper. The part of the weight that trains is chosen by the order of its columns and not by their
        importance; where that order means nothing PiSSA's choice has a reason and this one has not.

    Paper and code:
        Hugging Face PEFT starts at the same factors and the same model for every α; it subtracts s L₀A₀ from the
        weight itself and rounds the rest to its dtype, which is not offered.
    """

    learning_rates: ClassVar = {"vision": 3e-3, "language": 2e-4}
    latex: ClassVar[str] = r"W' = W_0 + s\,(L A - L_0 A_0),\quad W_0 = Q R,\quad L_0 = Q_{:,:r},\quad A_0 = R_{:r,:}"
    reference: ClassVar = Reference(
        key="buyukakyuz2024olora",
        authors="Büyükakyüz, Kerim",
        title="OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
        year=2024,
        arxiv="2406.01775",
    )

    def start(self, w: Tensor, given: Given) -> Tensors:
        q, upper = torch.linalg.qr(w)  # (*b, m, k), (*b, k, n)
        sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(w)[..., : self._rank]  # (*b, r)
        return {
            "L": q[..., : self._rank] * sign.unsqueeze(-2),
            "A": upper[..., : self._rank, :] * sign.unsqueeze(-1),
        }
