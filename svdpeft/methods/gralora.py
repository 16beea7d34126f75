"""GraLoRA: a pair of low-rank factors for every block of a grid over the weight.

    W' = W0 + ΔW        ΔW_ij = s L_ij A_ij, i, j = 1 … k        s = α/r
    L_ij = 0, (m/k, r/k)        A_ij ~ U(−1/√(n/k), 1/√(n/k)), (r/k, n/k)

    ΔW = [L of block row i on the columns (i, j, ·)] · [A_ij at block column j]: a product of rank k r

Y. Jung, D. Ahn, H. Kim, T. Kim, E. Park. GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning.
NeurIPS 2025, arXiv:2505.20355.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.decomposition import Product
from svdpeft.methods.base import Factors, Given, Reference, Scaled, Tensors, generator
from svdpeft.methods.base.drawn import kaiming
from svdpeft.registry import METHODS


@METHODS.register("gralora")
@dataclass(frozen=True)
class GraLoRA(Scaled):
    """LoRA's number of values, k times its rank: blocks do not share directions.

    When to use:
        At large ranks, where LoRA's gradients mix what different inputs want: outliers of one block of the inputs touch
        one column of blocks alone. k = 2, or 4 for ranks from 64 on. An adapter is a LoRA of rank k r, exactly.

    Paper and code:
        The hybrid, with a part of the rank as a plain LoRA, is not offered.

    Args:
        alpha: α of s = α/r; ``None`` is α = r.
        grid: k; it must divide the sizes of the weight and the rank, unless ``clip_rank`` takes the largest that does.

    Example:
        >>> GraLoRA(rank=8).count(1, 30, 20), GraLoRA(rank=8).at("fc", 30, 20).export_rank(30, 20)
        (400, 16)
    """

    rank: int | dict[str, int] | None = 32
    grid: int = 2

    anchored: ClassVar[bool] = False
    draws: ClassVar = True
    resolved: ClassVar[tuple[str, ...]] = ("rank", "alpha", "grid")
    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    latex: ClassVar[str] = (
        r"W'_{ij} = W_{0,ij} + s\,L_{ij} A_{ij},\qquad i, j = 1 \ldots k,\quad L_{ij} = 0 \text{ at the start}"
    )
    reference: ClassVar = Reference(
        key="jung2025gralora",
        authors="Jung, Yeonjoon and Ahn, Daehyun and Kim, Hyungjun and Kim, Taesu and Park, Eunhyeok",
        title="GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning",
        year=2025,
        venue="Advances in Neural Information Processing Systems",
        arxiv="2505.20355",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid < 1:
            raise ValueError(f"grid {self.grid} is below 1")

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()):
        found = super().at(site, m, n, clip, roles)
        fits = [k for k in range(1, self.grid + 1) if m % k == n % k == found._rank % k == 0]
        if fits[-1] != self.grid and not clip:
            raise ValueError(
                f"grid {self.grid} does not divide all of {m}, {n} and rank {found._rank} of {site}: {fits[-1]} would; "
                "clip_rank=True chooses one"
            )
        return dataclasses.replace(found, grid=fits[-1])

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        k, r = self.grid, self._rank
        a = kaiming(*batch, k, r, n // k, source=generator(given.seed))  # of block column j, the r/k of each row i
        return {"L": w.new_zeros(*batch, k, m // k, r), "A": a.to(w)}

    def export_rank(self, m: int, n: int) -> int:
        return min(self.grid * self._rank, m, n)

    def now(self, f: Factors) -> Product:
        # L is (i, m/k, r) with columns (j, ρ), A is (j, r, n/k) with rows (i, ρ): the rank runs over (i, j, ρ).
        eye = torch.eye(f.L.shape[-3], dtype=f.L.dtype, device=f.L.device)[:, None, :, None]
        left = eye * f.L.unsqueeze(-2)  # (i, m/k, i', r)
        right = f.A.unflatten(-2, (len(eye), -1)).transpose(-4, -3)  # (i, j, ρ, n/k)
        right = eye * right.unsqueeze(-2)  # (i, j, ρ, j', n/k)
        return Product(left.flatten(-4, -3).flatten(-2), None, right.flatten(-2).flatten(-4, -2), self.scale)
