"""AntiPaSTO: steer a model both ways with one coefficient on a rotation and a shift of its spectrum.

    W' = W0 + U_r (C(α) − Σ_r) V_rᵀ        C(α) = (Σ_r + α diag(C)) Rot(α)    C = ΔS
    Rot(α) = (I − αX/2)(I + αX/2)⁻¹,  X = a tanh(Q/a) entry by entry,  a = 2 tan(θ_max/2),  Q = −Qᵀ

ΔS = 0 and Q = 0 at the start. α = ±1 in training; afterwards ``adapter.set(coefficient=-0.5)``, and 0 is the base.

M. J. Clark. AntiPaSTO: Self-Supervised Honesty Steering via Anti-Parallel Representations. arXiv:2601.07473.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdpeft.decomposition import cayley_offset, full_precision, skew, skew_count
from svdpeft.methods.base import Factors, Given, Reference, Tensors, generator
from svdpeft.methods.base.frozen_bases import FrozenBases
from svdpeft.registry import METHODS

ROTATES = ("V", "U", "both", "none")


@METHODS.register("antipasto")
@dataclass(frozen=True)
class AntiPaSTO(FrozenBases):
    """A rotation that turns back where the coefficient changes its sign: Rot(−α) = Rot(α)ᵀ.

    When to use:
        Steering: one adapter, trained so that α = 1 and α = −1 move the model in opposite ways, then dialled while
        the model runs. ``adapter.set(coefficient=…)`` is one small write per site, also under torch.compile. The loss
        that makes it so, on contrasting pairs, is the user's; without one this is an SSVD with bounded angles. At
        Q = ΔS = 0 the two signs give one model, so a loss on their difference has no gradient there: then take
        ``reference_init=True``.

    Paper and code:
        The code starts off the base model, entries of X from N(0, (0.006 √2)²) and ΔS from N(4e-4, (4e-4)²):
        ``reference_init=True``.
        The code keeps all r² values of Q and antisymmetrises them; here it is the r(r − 1)/2 of the paper's count.
        The paper gives θ_max as π/2 and as π/3, the code has π/3. The bound holds for an entry: the angle of a
        rotation in more than two dimensions may become larger.
        The author's port (lora-lite) rotates blocks of 4 with θ_max = 0.5 at r = 256, in the other sense, and has no
        α: ``block=4, max_angle=0.5, rank=256``. Its later form without a rotation is not offered.
        Paper and code choose the triplets by the activations of contrasting pairs; not offered, the leading r are
        taken, as the code does without such a choice.

    Args:
        coefficient: α at the start; any finite number.
        max_angle: θ_max in radians, in (0, π]; π is no bound.
        rotates: ``"V"``, the input's vectors, as published; ``"U"``, ``"both"`` (each by its own), or ``"none"``.
        block: size of the blocks that rotate apart; r must be a multiple. ``None`` is one block of r.
        reference_init: a start off the base, see above.

    Example:
        >>> AntiPaSTO(rank=128).count(1, 1152, 1152), AntiPaSTO(rank=256, block=4).count(1, 1152, 1152)
        (8256, 640)
    """

    rank: int | dict[str, int] | None = 128
    coefficient: float = 1.0
    max_angle: float = math.pi / 3
    rotates: Literal["V", "U", "both", "none"] = "V"
    block: int | None = None
    reference_init: bool = False

    settable: ClassVar = ("coefficient",)
    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    latex: ClassVar[str] = (
        r"W'(\alpha) = W_0 + U_r\,\bigl((\Sigma_r + \alpha\,\Delta S)\,\mathrm{Rot}(\alpha) - \Sigma_r\bigr)\,V_r^\top,"
        r"\quad \mathrm{Rot}(\alpha) = (I - \tfrac{\alpha}{2}X)(I + \tfrac{\alpha}{2}X)^{-1}"
    )
    reference: ClassVar = Reference(
        key="clark2026antipasto",
        authors="Clark, Michael J.",
        title="AntiPaSTO: Self-Supervised Honesty Steering via Anti-Parallel Representations",
        year=2026,
        arxiv="2601.07473",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotates not in ROTATES:
            raise ValueError(f"rotates {self.rotates!r} is not one of {', '.join(ROTATES)}")
        if not 0.0 < self.max_angle <= math.pi:
            raise ValueError(f"max_angle {self.max_angle} is outside (0, π]; π is no bound")
        if not math.isfinite(self.coefficient):
            raise ValueError(f"coefficient {self.coefficient} is not a finite number")
        if self.block is not None and self.block < 2:
            raise ValueError(f"block {self.block} is less than 2: one dimension does not turn; see rotates='none'")

    @property
    def draws(self) -> bool:  # type: ignore[override]
        return self.reference_init

    @property
    def trains(self) -> tuple[str, ...]:  # type: ignore[override]
        rotates = "none" if self.rank == 1 else self.rotates  # one dimension does not turn
        return ("C", *{"V": ("Q",), "U": ("P",), "both": ("Q", "P"), "none": ()}[rotates])

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        return not self.reference_init

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()):
        method = super().at(site, m, n, clip, roles)
        r, block = method._rank, self.block or 1
        if clip and r >= block:  # the largest multiple that fits
            method = dataclasses.replace(method, rank=r - r % block)
        elif clip:
            method = dataclasses.replace(method, block=max(r, 2))
        elif r % block:
            raise ValueError(f"rank {r} at {site} ({m}x{n}) is not a multiple of block={block}")
        return method

    @property
    def _size(self) -> int:
        """Of one block."""
        return min(self.block or self._rank, self._rank)

    def start(self, w: Tensor, given: Given) -> Tensors:
        tensors, names = self.bases(w, given), self.trains
        batch, blocks = w.shape[:-2], self._rank // self._size
        random = generator(given.seed)
        tensors["C"] = torch.zeros_like(tensors["sigma"])
        for name in names[1:]:
            tensors[name] = w.new_zeros(*batch, blocks * skew_count(self._size))
        if self.reference_init:
            # The code draws r×r values of std 0.003, subtracts the transpose, and does so again in the forward.
            for name, mean, std in ((names[0], 4e-4, 4e-4), *((name, 0.0, 0.006 * math.sqrt(2)) for name in names[1:])):
                noise = torch.randn(tensors[name].shape, generator=random, dtype=torch.float64)
                tensors[name] = (mean + std * noise).to(w)
        return tensors | {"coefficient": w.new_full((1,), self.coefficient)}

    def change(self, f: Factors) -> Tensor:
        names, shift = self.trains, f.coefficient * f.C
        if len(names) == 1:
            return shift
        # (I + F)(Σ + αΔS)(I + E) − Σ with both rotations as their distances from the identity
        change, sigma = torch.diag_embed(shift), torch.diag_embed(f.sigma)
        if "Q" in names:
            change = change + (f.sigma + shift).unsqueeze(-1) * self._turn(f.Q, -f.coefficient)
        if "P" in names:
            with full_precision(change):
                change = change + self._turn(f.P, f.coefficient) @ (sigma + change)
        return change

    def _turn(self, values: Tensor, coefficient: Tensor) -> Tensor:
        """(I + αX/2)(I − αX/2)⁻¹ − I, (*b, r, r), block by block."""
        size, blocks = self._size, self._rank // self._size
        if self.max_angle < math.pi:
            limit = 2 * math.tan(self.max_angle / 2)
            values = limit * torch.tanh(values / limit)
        turn = cayley_offset(coefficient / 2 * skew(values.unflatten(-1, (blocks, -1)), size))  # (*b, q, s, s)
        apart = torch.eye(blocks, dtype=turn.dtype, device=turn.device)[:, None, :, None]
        return (turn.unsqueeze(-2) * apart).flatten(-4, -3).flatten(-2)  # (*b, q s, q s)

    def count(self, batch: int, m: int, n: int) -> int:
        """r + r(r − 1)/2 per matrix; with blocks of b values, r + r(b − 1)/2; the second part twice for both sides."""
        sides = {"both": 2, "none": 0}.get(self.rotates, 1)
        return batch * (self._rank + sides * self._rank // self._size * skew_count(self._size))
