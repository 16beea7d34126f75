"""RandLoRA: a full-rank update from a few numbers, the sum of many scaled random low-rank bases.

    W' = W0 + s Σᵢ Bᵢ Λᵢ A Γᵢ        i = 1 … ⌈k/r⌉    k = min(m, n)    Λ = 0    Γ = 1/max(m, n)    s = α/r

Λᵢ (r) and Γᵢ (k) are diagonals and train; Bᵢ (max(m, n), r) and A (r, k) are random with unit variance, frozen and
shared by all sites. For m < n both sides are transposed, so that Γ stays on the smaller one. Shared bases are allocated
for the largest layer; the numbers that a site takes do not depend on it, but for ``bases="very-sparse"``.

P. Albert, F. Z. Zhang, H. Saratchandran, C. Rodriguez-Opazo, A. van den Hengel, E. Abbasnejad. RandLoRA: Full-rank
parameter-efficient fine-tuning of large models. ICLR 2025, arXiv:2502.00987.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdpeft.decomposition import Product
from svdpeft.methods.base import Factors, Given, Reference, Scaled, Tensors, generator
from svdpeft.registry import METHODS

BASES = ("dense", "sparse", "very-sparse")


@METHODS.register("randlora")
@dataclass(frozen=True)
class RandLoRA(Scaled):
    """Every direction of the weight can change, for about k²/r values instead of m n.

    When to use:
        Where LoRA stays behind full fine-tuning however large its rank, at a count of LoRA's order. A *smaller* r means
        more bases and more values. A step costs about as much as building a dense ΔW per layer; the shared bases take
        max(m, n) · k values once per model.

    Paper and code:
        Γ starts at 1/max(m, n) in the constructor of the published code, which its reset then replaces by 1/k:
        gamma="peft" (the two differ where m ≠ n).
        PEFT divides the bases by their measured deviation, here by that of their distribution.
        PEFT flattens Λ A Γ rank first and B basis first, which pairs the columns of B in another order.

    Args:
        rank: r of one basis, or a mapping from site pattern to r; may exceed min(m, n).
        alpha: α; the default 640 is twenty times the default rank, as in the paper's code; ``None`` is α = r.
        bases: ``"dense"``: uniform; ``"sparse"``: −1, 0, 1 with two thirds of zeros; ``"very-sparse"``: with
            1 − 1/√(largest k) of zeros.
        gamma: Γ at the start: ``"shape"`` or ``"peft"``.

    Example:
        >>> RandLoRA(rank=32).count(1, 768, 768)  # 24 bases
        19200
    """

    rank: int | dict[str, int] | None = 32
    alpha: float | None = 640.0
    bases: Literal["dense", "sparse", "very-sparse"] = "dense"
    gamma: Literal["shape", "peft"] = "shape"

    learning_rates: ClassVar = {"vision": 1e-3, "language": 3e-4}
    trains: ClassVar[tuple[str, ...]] = ("Lambda", "Gamma")
    anchored: ClassVar[bool] = False
    reference: ClassVar = Reference(
        key="albert2025randlora",
        authors="Albert, Paul and Zhang, Frederic Z. and Saratchandran, Hemanth and Rodriguez-Opazo, Cristian and "
        "van den Hengel, Anton and Abbasnejad, Ehsan",
        title="RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
        year=2025,
        venue="International Conference on Learning Representations",
        arxiv="2502.00987",
    )
    draws: ClassVar = True
    latex: ClassVar[str] = r"W' = W_0 + s \sum_{i=1}^{\lceil k/r \rceil} B_i \Lambda_i A \Gamma_i"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bases not in BASES:
            raise ValueError(f"bases {self.bases!r} is not one of {', '.join(BASES)}")
        if self.gamma not in ("shape", "peft"):
            raise ValueError(f"gamma {self.gamma!r} is neither 'shape' nor 'peft'")

    def rank_limit(self, m: int, n: int) -> None:
        return None

    def number(self, m: int, n: int) -> int:
        """Number of bases, ⌈min(m, n) / r⌉: enough for full rank."""
        return math.ceil(min(m, n) / self._rank)

    def group(self, given: Given) -> str:
        return f"randlora r={self._rank}"

    def share(self, group: Sequence[Given]) -> Tensors:
        sizes = [sorted(site.shape[1:]) for site in group]
        small, large = (max(size) for size in zip(*sizes, strict=True))
        sparsity = {"dense": 0.0, "sparse": 3.0, "very-sparse": math.sqrt(small)}[self.bases]
        given, count = group[0], self.number(small, large)
        # A stream for A and one per basis, row by row: larger layers add rows and bases and change nothing else.
        random = generator(given.seed_of(self.group(given)))
        streams = [generator(int(seed)) for seed in torch.randint(2**31, (1 + count,), generator=random)]
        a, *b = (self._draw(small if i == 0 else large, sparsity, stream) for i, stream in enumerate(streams))
        tensors = {"A": a.mT.contiguous(), "B": torch.stack(b, 1)}  # (r, k), (max, bases, r)
        return {name: t.to(given.device, given.dtype) for name, t in tensors.items()}

    def _draw(self, rows: int, sparsity: float, random: torch.Generator) -> Tensor:
        """A random matrix (rows, r) of unit variance."""
        drawn = torch.rand(rows, self._rank, generator=random, dtype=torch.float64)
        if not sparsity:
            return (2 * drawn - 1) * math.sqrt(3)
        edge = 1 / (2 * sparsity)
        return ((drawn > 1 - edge).double() - (drawn < edge).double()) * math.sqrt(sparsity)

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        count, gamma = self.number(m, n), 1 / (max(m, n) if self.gamma == "shape" else min(m, n))
        return {
            "Lambda": w.new_zeros(*batch, count, self._rank),
            "Gamma": w.new_full((*batch, count, min(m, n)), gamma),
        }

    def core(self, f: Factors) -> None:
        return None

    def now(self, f: Factors) -> Product:
        _, m, n = f.shape
        scaled = f.Lambda.unsqueeze(-1) * f.A[:, : min(m, n)] * f.Gamma.unsqueeze(-2)  # (*b, bases, r, k)
        right = scaled.flatten(-3, -2)  # (*b, bases · r, k)
        left = f.B[: max(m, n), : f.Lambda.shape[-2]].flatten(1).expand(*right.shape[:-2], -1, -1)
        left, right = (left, right) if m >= n else (right.mT, left.mT)
        return Product(left, None, right, self.scale)

    def count(self, batch: int, m: int, n: int) -> int:
        """⌈k/r⌉ (r + k) per matrix, k = min(m, n)."""
        return batch * self.number(m, n) * (self._rank + min(m, n))

    def export_rank(self, m: int, n: int) -> int:
        return min(m, n)

    def knob_values(self, sites: Sequence[Given]) -> list[int]:
        """Ranks from large to small: the fewer columns a basis has, the more bases there are."""
        k = max(min(site.shape[1:]) for site in sites)
        return sorted({math.ceil(k / bases) for bases in range(1, k + 1)}, reverse=True)
