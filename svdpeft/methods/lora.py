"""LoRA: a random low-rank update that starts at zero.

    W' = W0 + s L A        L = 0    A ~ U(−1/√n, 1/√n)    s = α/r, or α/√r (rsLoRA)

E. J. Hu, Y. Shen, P. Wallis, Z. Allen-Zhu, Y. Li, S. Wang, L. Wang, W. Chen. LoRA: Low-Rank Adaptation of Large
Language Models. ICLR 2022, arXiv:2106.09685. The scale α/√r: D. Kalajdzievski, arXiv:2312.03732.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.factors import Given, Tensors
from svdpeft.methods.base import Factored, Reference, generator
from svdpeft.registry import METHODS


@METHODS.register("lora")
@dataclass(frozen=True)
class LoRA(Factored):
    """The baseline of the family: needs nothing from the weight but its shape.

    Args:
        rank: r, or a mapping from site pattern to r.
        alpha: α; ``None`` is α = r.
        dropout: on the adapter's input.
        rs: rank-stabilised scale, α/√r instead of α/r.

    Example:
        >>> LoRA(rank=16, alpha=32).scale, LoRA(rank=16, rs=True).scale
        (2.0, 4.0)
    """

    anchored: ClassVar[bool] = False
    reference: ClassVar = Reference(
        key="hu2022lora",
        authors="Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and "
        "Wang, Shean and Wang, Lu and Chen, Weizhu",
        title="LoRA: Low-Rank Adaptation of Large Language Models",
        year=2022,
        venue="International Conference on Learning Representations",
        arxiv="2106.09685",
    )

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        uniform = torch.rand(*batch, self._rank, n, generator=generator(given.seed), dtype=torch.float64)
        return {"L": w.new_zeros(*batch, m, self._rank), "A": ((2 * uniform - 1) / math.sqrt(n)).to(w)}

    def count(self, batch: int, m: int, n: int) -> int:
        """r (m + n) per matrix."""
        return batch * self._rank * (m + n)
