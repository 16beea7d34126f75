"""SALT: scale and shift the leading singular values of a weight, and change the core of all others at a low rank.

    W' = W0 + U (C − Σ) Vᵀ        C = diag(a ∘ σ_k + b) ⊕ (diag(σ_rest) + X Y)        X ~ U(−√(6/r), √(6/r))
    a = 1, b = 0, Y = 0 at the start        k = ⌊ratio · min(m, n)⌋, at least 1        relu: C ← ReLU(C), entry by entry

A. Elsayed, S. Hashmi, M. Elseiagy, H. Wang, M. Yaqub, I. Almakky. SALT: Parameter-Efficient Fine-Tuning via Singular
Value Adaptation with Low-Rank Transformation. arXiv:2503.16055.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from svdpeft.decomposition import Product, truncated_svd
from svdpeft.methods.base import Factors, Given, Reference, Tensors, generator
from svdpeft.methods.base.frozen_bases import FrozenBases
from svdpeft.registry import METHODS


@METHODS.register("salt")
@dataclass(frozen=True)
class SALT(FrozenBases):
    """The spectrum's head by two values each, as SVF and SVDiff, and its tail by a LoRA between the singular vectors.

    When to use:
        Where the strengths of the leading directions should follow the task, and the many small ones may be mixed: made
        for segmentation models and pictures unlike those of their training. 2k + 2r(min(m, n) − k) values, hardly fewer
        than LoRA's at the same rank; U and V are stored beside the weight, twice the size of a square one.

    Paper and code:
        The published runs have r = 256; the default is ours, for narrower layers.
        The code puts the whole core through a ReLU, ``relu=True``: then it also loses every entry of X Y that falls
        below zero, the update has full rank, and no LoRA of a small rank can hold it.
        The code's convolutions draw both X and Y and so start off the base model; here Y is zero for all kinds.
        The code's penalty on the shift and on X Y has a weight of zero by default: not offered.

    Args:
        rank: r, of the change of the tail's core, or a mapping from site pattern to r.
        ratio: share of the singular values, in (0, 1), that are scaled and shifted.
        relu: no entry of the core falls below zero.

    Example:
        >>> SALT(rank=8).at("layer", 300, 200).count(1, 300, 200)  # 2 · 20 + 2 · 8 · 180
        2920
    """

    rank: int | dict[str, int] | None = 64
    ratio: float = 0.1
    relu: bool = False

    draws: ClassVar = True
    family: ClassVar = "core"
    learning_rates: ClassVar = {"vision": 1e-3, "language": 1e-3}
    latex: ClassVar[str] = (
        r"W' = U\,\bigl(\mathrm{diag}(a \circ \sigma_k + b) \oplus (\mathrm{diag}(\sigma_{>k}) + X Y)\bigr)\,V^\top,"
        r"\qquad a_0 = 1,\; b_0 = 0,\; Y_0 = 0"
    )
    reference: ClassVar = Reference(
        key="elsayed2025salt",
        authors="Elsayed, Abdelrahman and Hashmi, Sarim and Elseiagy, Mohammed and Wang, Hu and Yaqub, Mohammad and "
        "Almakky, Ibrahim",
        title="SALT: Parameter-Efficient Fine-Tuning via Singular Value Adaptation with Low-Rank Transformation",
        year=2025,
        arxiv="2503.16055",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"ratio {self.ratio} is outside (0, 1)")

    @property
    def trains(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("a", "b", "X", "Y") if self.rank != 0 else ("a", "b")

    def head(self, m: int, n: int) -> int:
        """k: how many singular values are scaled and shifted."""
        return max(int(self.ratio * min(m, n)), 1)

    def rank_limit(self, m: int, n: int) -> int:
        return min(m, n) - self.head(m, n)

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()):
        if min(m, n) == 1:  # a single singular value has no tail
            return dataclasses.replace(self, rank=0)
        return super().at(site, m, n, clip, roles)

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        k, r = self.head(m, n), self._rank
        u, s, vh = truncated_svd(w, min(m, n), self.driver, seed=given.seed, where=given.name)
        tensors = {"L": u, "sigma": s, "A": vh, "a": w.new_ones(*batch, k), "b": w.new_zeros(*batch, k)}
        if r:
            x = 2 * torch.rand(*batch, min(m, n) - k, r, generator=generator(given.seed), dtype=torch.float64) - 1
            tensors |= {"X": (math.sqrt(6 / r) * x).to(w), "Y": w.new_zeros(*batch, r, min(m, n) - k)}
        return tensors

    def shift(self, f: Factors) -> Tensor:
        """Change of the leading singular values, (*b, k)."""
        return (f.a - 1) * f.sigma[..., : f.a.shape[-1]] + f.b

    def change(self, f: Factors) -> Tensor:
        shift = torch.diag_embed(self.shift(f))
        rest = f.sigma.shape[-1] - shift.shape[-1]
        change = F.pad(shift, (0, rest, 0, rest))
        if self._rank:
            change = change + F.pad(f.X @ f.Y, (shift.shape[-1], 0, shift.shape[-1], 0))
        return torch.maximum(change, -torch.diag_embed(f.sigma)) if self.relu else change  # ReLU(C) − Σ

    def update(self, f: Factors) -> Product:
        if self.relu:
            return super().update(f)
        shift = self.shift(f)
        k = shift.shape[-1]
        left, right = f.L[..., :k] * shift.unsqueeze(-2), f.A[..., :k, :]
        if not self._rank:
            return Product(left, None, right)
        return Product(torch.cat([left, f.L[..., k:] @ f.X], -1), None, torch.cat([right, f.Y @ f.A[..., k:, :]], -2))

    def replaces_weight(self, m: int, n: int) -> bool:
        return True  # all triplets are there

    def count(self, batch: int, m: int, n: int) -> int:
        """2 k + 2 r (min(m, n) − k) per matrix."""
        k = self.head(m, n)
        return batch * (2 * k + 2 * self._rank * (min(m, n) - k))

    def export_rank(self, m: int, n: int) -> int:
        return min(m, n) if self.relu else min(self.head(m, n) + self._rank, m, n)
