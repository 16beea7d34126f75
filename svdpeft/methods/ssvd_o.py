"""SSVD-O: SSVD with a rotation of the output side as well, each side with a budget of its own.

    W' = W0 + U_r (C − Σ_r) V_rᵀ        C = (G_o ⊕ I)(Σ_r + diag(ΔΣ))(G_i ⊕ I)        ΔΣ = 0, G = I at the start
    G = (I + Q)(I − Q)⁻¹,  Q = −Qᵀ,  of the first k_o, and k_i, of the r directions

P. Wang, S. Watanabe, H. Van hamme. SSVD-O: Parameter-Efficient Fine-Tuning with Structured SVD for Speech Recognition.
ICASSP 2026, arXiv:2601.12600.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from svdpeft.decomposition import cayley_offset, full_precision, skew, skew_count
from svdpeft.methods.base import Factors, Given, Reference, Tensors
from svdpeft.methods.base.frozen_bases import FrozenBases
from svdpeft.registry import METHODS

SIDES = ("outputs", "inputs")


@METHODS.register("ssvd-o")
@dataclass(frozen=True)
class SSVDO(FrozenBases):
    """What the weight reads from and what it writes to both turn, as far as each is given directions.

    When to use:
        As SSVD, where the meaning of the outputs has to follow, too. ``outputs`` and ``inputs`` say how the values are
        split between the sides: one of k directions has k(k − 1)/2 angles. ``outputs=1`` is SSVD. Each forward solves a
        system per side.

    Paper and code:
        There was no official code to compare with, and of the paper the abstract alone: that the rotations are Cayley's
        and turn leading directions first is SSVD's form on both sides, and ours; so are the defaults.

    Args:
        rank: r, the number of leading values that are shifted, or a mapping from site pattern to r.
        outputs: k_o, how many of the r output directions turn, lowered to r; ``None`` is all, 1 none.
        inputs: k_i, how many of the r input directions turn, lowered to r; ``None`` is all, 1 none.

    Example:
        >>> SSVDO(rank=32, outputs=8).at("layer", 512, 512).count(1, 512, 512)  # 32 + 8 · 7 / 2 + 32 · 31 / 2
        556
    """

    rank: int | dict[str, int] | None = 32
    outputs: int | None = None
    inputs: int | None = None

    resolved: ClassVar = ("rank", "outputs", "inputs")
    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    latex: ClassVar[str] = (
        r"W' = W_0 + U_r\,\bigl((G_o \oplus I)(\Sigma_r + \Delta\Sigma)(G_i \oplus I) - \Sigma_r\bigr)\,V_r^\top,"
        r"\quad G = (I+Q)(I-Q)^{-1}"
    )
    reference: ClassVar = Reference(
        key="wang2026ssvdo",
        authors="Wang, Pu and Watanabe, Shinji and Van hamme, Hugo",
        title="SSVD-O: Parameter-Efficient Fine-Tuning with Structured SVD for Speech Recognition",
        year=2026,
        venue="International Conference on Acoustics, Speech and Signal Processing",
        arxiv="2601.12600",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for side in SIDES:
            if (size := getattr(self, side)) is not None and size < 1:
                raise ValueError(f"{side} {size} is below 1, which turns nothing already")

    @property
    def trains(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("C", *(f"Q_{side}" for side in SIDES if self._turns(side) != 1))

    def _turns(self, side: str) -> object:
        """How many directions of a side turn; where the rank is not settled, whatever says it."""
        size = getattr(self, side)
        return self.rank if size is None else size

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()):
        here = super().at(site, m, n, clip, roles)
        sizes = {side: here._rank if (size := getattr(self, side)) is None else size for side in SIDES}
        return dataclasses.replace(here, **{side: min(size, here._rank) for side, size in sizes.items()})

    def start(self, w: Tensor, given: Given) -> Tensors:
        tensors = self.bases(w, given) | {"C": w.new_zeros(*w.shape[:-2], self._rank)}
        for side in SIDES:
            if f"Q_{side}" in self.trains:
                tensors[f"Q_{side}"] = w.new_zeros(*w.shape[:-2], skew_count(getattr(self, side)))
        return tensors

    def change(self, f: Factors) -> Tensor:
        # (I + T_o) D (I + T_i) − Σ = ΔΣ + T_o D + (I + T_o) D T_i, with D = Σ + ΔΣ
        change, turned = torch.diag_embed(f.C), torch.diag_embed(f.sigma + f.C)
        for side in SIDES:
            if f"Q_{side}" in self.trains:
                size: int = getattr(self, side)
                rest = self._rank - size
                turn = F.pad(cayley_offset(skew(getattr(f, f"Q_{side}"), size)), (0, rest, 0, rest))
                with full_precision(turn):
                    more = turn @ turned if side == "outputs" else turned @ turn
                change, turned = change + more, turned + more
        return change

    def count(self, batch: int, m: int, n: int) -> int:
        """r + k_o(k_o − 1)/2 + k_i(k_i − 1)/2 per matrix."""
        return batch * (self._rank + sum(skew_count(getattr(self, side)) for side in SIDES))
