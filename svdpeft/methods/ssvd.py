"""SSVD: shift the leading singular values and rotate the input side of the weight, not its output side.

    W' = W0 + U_r (C − Σ_r) V_rᵀ        C = (Σ_r + diag(ΔΣ)) G    ΔΣ = 0, G = I at the start

    cayley         G = (I + Q)(I − Q)⁻¹,  Q = −Qᵀ;  the paper's K is −Q
    first-order    G = I + 2Q: not orthogonal
    free           G any r×r matrix

P. Wang, S. Watanabe, H. Van hamme. SSVD: Structured SVD for Parameter-Efficient Fine-Tuning and Benchmarking under
Domain Shift in ASR. arXiv:2509.02830.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdpeft.decomposition import cayley_offset, skew, skew_count
from svdpeft.methods.base import Factors, Given, Reference, Tensors, generator
from svdpeft.methods.base.frozen_bases import FrozenBases
from svdpeft.registry import METHODS

ROTATIONS = ("cayley", "first-order", "free")
SIDES = ("input", "smaller")


@METHODS.register("ssvd")
@dataclass(frozen=True)
class SSVD(FrozenBases):
    """The output's meaning stays, what it is read from turns: made for a change of domain at the input.

    When to use:
        Speech and other models whose input changes (children's voices, dialects) while what they say does not. The
        number of values is r(r + 1)/2: quadratic, so a large r costs more than LoRA does, and the Cayley rotation
        solves an r×r system in every forward. For a rotation under exact orthogonality without ΔΣ, see PSOFT.

    Paper and code:
        The paper defines G by Cayley and works with its first order, I − 2K, which ESPnet's code alone has:
        ``rotation="first-order"``. Here an orthogonal G is the default.
        ESPnet's code draws ΔΣ from U(−√(6/r), √(6/r)) and multiplies it by a trained sigmoid gate, so that it starts
        off the base model: ``reference_init=True``.
        ESPnet's code decomposes the transpose where m < n, and so rotates the output side there: ``side="smaller"``.
        It takes r as a number or as a fraction of min(m, n), ``rank=None, ratio=0.25``; the defaults of both are ours.

    Args:
        rank: r, or a mapping from site pattern to r; ``None`` is the fraction ``ratio`` of min(m, n).
        rotation: ``"cayley"``, ``"first-order"`` or ``"free"``, what G is.
        side: that G turns. ``"input"``, as the paper has it, or ``"smaller"``, the input of a tall or square weight and
            the output of a wide one, as (Gᵀ)(Σ_r + diag(ΔΣ)).
        reference_init: ΔΣ as in ESPnet's code, off the base.
        ratio: fraction in (0, 1], where ``rank`` is ``None``.

    Example:
        >>> SSVD(rank=None, ratio=0.25).at("layer", 512, 2048).count(1, 512, 2048)  # 128 · 129 / 2
        8256
    """

    rank: int | dict[str, int] | None = 32
    rotation: Literal["cayley", "first-order", "free"] = "cayley"
    side: Literal["input", "smaller"] = "input"
    reference_init: bool = False
    ratio: float = 0.25

    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    latex: ClassVar[str] = (
        r"W' = W_0 + U_r\,\bigl((\Sigma_r + \Delta\Sigma)\,G - \Sigma_r\bigr)\,V_r^\top,\quad G = (I+Q)(I-Q)^{-1}"
    )
    reference: ClassVar = Reference(
        key="wang2025ssvd",
        authors="Wang, Pu and Watanabe, Shinji and Van hamme, Hugo",
        title="SSVD: Structured SVD for Parameter-Efficient Fine-Tuning and Benchmarking under Domain Shift in ASR",
        year=2025,
        arxiv="2509.02830",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotation not in ROTATIONS:
            raise ValueError(f"rotation {self.rotation!r} is not one of {', '.join(ROTATIONS)}")
        if self.side not in SIDES:
            raise ValueError(f"side {self.side!r} is not one of {', '.join(SIDES)}")
        if not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"ratio {self.ratio} is outside (0, 1]")

    @property
    def draws(self) -> bool:  # type: ignore[override]
        return self.reference_init

    @property
    def trains(self) -> tuple[str, ...]:  # type: ignore[override]
        turns = ("G",) if self.rotation == "free" else ("Q",) if self.rank != 1 else ()  # one dimension does not turn
        return ("C", *turns, "gate") if self.reference_init else ("C", *turns)

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        return not self.reference_init

    def default_rank(self, m: int, n: int) -> int:
        return max(int(self.ratio * min(m, n)), 1)

    def start(self, w: Tensor, given: Given) -> Tensors:
        tensors, r = self.bases(w, given), self._rank
        batch = w.shape[:-2]
        tensors["C"] = w.new_zeros(*batch, r)
        if "G" in self.trains:
            tensors["G"] = w.new_zeros(*batch, r, r)  # G − I, so that weight decay pulls towards the base
        if "Q" in self.trains:
            tensors["Q"] = w.new_zeros(*batch, skew_count(r))
        if self.reference_init:
            uniform = torch.rand(*batch, r, generator=generator(given.seed), dtype=torch.float64)
            tensors["C"] = ((2 * uniform - 1) * math.sqrt(6 / r)).to(w)
            tensors["gate"] = w.new_zeros(*batch, 1)
        return tensors

    def change(self, f: Factors) -> Tensor:
        shift = f.C * torch.sigmoid(f.gate) if self.reference_init else f.C
        if "G" not in self.trains and "Q" not in self.trains:
            return shift
        # (Σ + ΔΣ) G − Σ = ΔΣ + (Σ + ΔΣ)(G − I)
        turn = f.G if self.rotation == "free" else self._turn(skew(f.Q, self._rank))
        wide = f.L.shape[-2] < f.A.shape[-1]
        scaled = (f.sigma + shift).unsqueeze(-1) * turn
        if self.side == "smaller" and wide:
            scaled = turn.mT * (f.sigma + shift).unsqueeze(-2)
        return torch.diag_embed(shift) + scaled

    def _turn(self, q: Tensor) -> Tensor:
        """G − I."""
        return cayley_offset(q) if self.rotation == "cayley" else 2 * q

    def count(self, batch: int, m: int, n: int) -> int:
        """r + r(r − 1)/2 per matrix; r + r² with a free rotation, and one gate more in the official code."""
        turns = self._rank**2 if self.rotation == "free" else skew_count(self._rank)
        return batch * (self._rank + turns + self.reference_init)
