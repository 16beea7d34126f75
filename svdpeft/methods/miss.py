"""MiSS: inputs are summed over shards before a single trained factor.

    W' = W0 + L A        L = 0    A = [I_r I_r … I_r], r×n, frozen, cut where r does not divide n

J. Kang, Q. Yin. MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing (earlier Bone, DiSHA).
arXiv:2409.15371.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.methods.base import Given, Reference, Tensors, Unscaled
from svdpeft.registry import METHODS


@METHODS.register("miss")
@dataclass(frozen=True)
class MiSS(Unscaled):
    """One trained factor; the other adds up every r-th input, and nothing is drawn.

    When to use:
        As a cheap LoRA: half of its values at a rank, and nothing of its start is random. The paper takes ranks at
        which it trains as many values as LoRA, about twice LoRA's.

    Paper and code:
        The code's Bat, W_ij + W_ij D_i + D_i by blocks, is of full rank and another method, and so is the variant
        ``mini``; not offered.

    Example:
        >>> MiSS(rank=64).count(1, 300, 200)
        19200
    """

    rank: int | dict[str, int] | None = 64

    trains: ClassVar = ("L",)
    anchored: ClassVar[bool] = False
    family: ClassVar = "low-rank"
    learning_rates: ClassVar = {"vision": 3e-3, "language": 2e-4}
    latex: ClassVar[str] = r"W' = W_0 + L\,[\,I_r\; I_r\; \cdots\; I_r\,],\qquad L_0 = 0"
    reference: ClassVar = Reference(
        key="kang2024miss",
        authors="Kang, Jiale and Yin, Qingyu",
        title="MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing",
        year=2024,
        arxiv="2409.15371",
    )

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        shard = torch.arange(n, device=w.device) % self._rank
        a = torch.nn.functional.one_hot(shard, self._rank).mT.to(w).expand(*batch, -1, -1)
        return {"L": w.new_zeros(*batch, m, self._rank), "A": a.clone()}
