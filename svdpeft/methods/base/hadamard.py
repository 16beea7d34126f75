"""The methods that multiply a weight, entry by entry, by terms of rank one.

W' = W0 + W0 ∘ Σ_j L_j A_j        W0 ∘ (L_j A_j) x = L_j ∘ (W0 (A_j ∘ x))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from svdpeft.decomposition import check_rank
from svdpeft.methods.base.call import Call
from svdpeft.methods.base.factors import Factors
from svdpeft.methods.base.transform import Transform
from svdpeft.patterns import chosen

FEW = 4  # products with the frozen weight that cost less than an m×n matrix that autograd keeps


@dataclass(frozen=True)
class Hadamard(Transform):
    """Abstract: W' is W0 times a matrix of rank r, entry by entry; it must say ``delta`` and ``act``.

    Args:
        rank: r, number of terms, or a mapping from site pattern to r.
    """

    rank: int | Mapping[str, int] = 1

    resolved: ClassVar = ("rank",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rank, int) and self.rank < 1:
            raise ValueError(f"rank {self.rank} is below 1")

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()):
        rank = chosen(self.rank, site, roles)
        return dataclasses.replace(self, rank=check_rank(min(rank, m, n) if clip else rank, m, n, site))

    def count(self, batch: int, m: int, n: int) -> int:
        """r (m + n) per matrix."""
        return batch * self._rank * (m + n)

    def acts(self, linear: bool) -> bool:
        return linear and self._rank <= FEW

    def terms(self, f: Factors, call: Call, change: Tensor, first: int) -> Tensor:
        """Return ``change`` plus L_j ∘ (W0 (A_j ∘ x)) of the terms from ``first`` on."""
        for j in range(first, self._rank):
            change = change + call.per_row(f.L[..., j]) * call.columns(f.A[..., j, :])
        return change
