"""KaSA: the weight without its smallest singular triplets, and a new part in SVD form in their place.

    W' = W0 − U_−r Σ_−r V_−rᵀ + s L diag(C) A        L = 0    C ~ N(0, 1)    A ~ U(−1/√n, 1/√n)    s = α/r
    penalty = Σ β ‖C‖² + γ (‖LᵀL − I‖_F + ‖A Aᵀ − I‖_F)

The model does not start as the base: what is dropped counts as noise. At least the leading triplet is kept.

F. Wang, J. Jiang, C. Park, S. Kim, J. Tang. KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models.
ICLR 2025, arXiv:2412.06071.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdpeft.decomposition import Product, minor_svd
from svdpeft.decomposition.orthonormality import orthonormality_error
from svdpeft.methods.base import Factors, Given, Reference, Tensors, Triplets, by_shape, generator
from svdpeft.methods.base.bases import bases
from svdpeft.registry import METHODS

REGULARISERS = ("paper", "reference")


@METHODS.register("kasa")
@dataclass(frozen=True)
class KaSA(Triplets):
    """Drops the tail of the weight, and learns an update with singular values and near-orthonormal vectors of its own.

    When to use:
        Where the smallest singular values are believed to be noise for the task. What is dropped is gone from the
        first step on, so a small rank is safer than a large one and a model whose layers have flat spectra starts
        damaged: look at the loss before the first step. The penalty has to be part of the loss; the trainer and the
        callback add it, a loop of your own adds ``adapter.penalty()``.

    Paper and code:
        The penalty is a sum over the sites; the published code divides by their number and takes ‖AᵀA − I_n‖_F and
        ‖L Lᵀ − I_m‖_F, which the n − r and m − r missing directions dominate: ``regulariser="reference"``.
        The published code keeps n − r triplets instead of min(m, n) − r and so drops none where n >= m + r:
        ``drop=0`` for such layers.
        Hugging Face PEFT has the paper's penalty, changes the weight for good, and leaves adding the penalty to you.

    Args:
        alpha: α; 16 in the published code, ``None`` is α = r.
        beta: β, weight of the singular values in the penalty.
        gamma: γ, weight of the departure from orthonormality.
        regulariser: ``"paper"`` or ``"reference"``, the published code's.
        drop: number of smallest triplets that leave the weight; ``None`` is r, or min(m, n) − 1 if that is less.
    """

    alpha: float | None = 16.0
    beta: float = 1e-4
    gamma: float = 1e-3
    regulariser: Literal["paper", "reference"] = "paper"
    drop: int | None = None

    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    trains: ClassVar = ("L", "C", "A")
    anchored: ClassVar[bool] = False  # L is zero at the start; what is subtracted is another part of W0
    pruned: ClassVar[tuple[str, ...]] = ("L",)
    resolved: ClassVar = ("rank", "alpha", "drop")
    draws: ClassVar = True
    latex: ClassVar[str] = r"W' = W_0 - U_{-r}\Sigma_{-r}V_{-r}^\top + s\,L\,\mathrm{diag}(C)\,A,\quad L_0 = 0"
    reference: ClassVar = Reference(
        key="wang2025kasa",
        authors="Wang, Fan and Jiang, Juyong and Park, Chansung and Kim, Sunghun and Tang, Jing",
        title="KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models",
        year=2025,
        venue="International Conference on Learning Representations",
        arxiv="2412.06071",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "gamma", "drop"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name} {value} is negative; 0 switches it off")
        if self.regulariser not in REGULARISERS:
            raise ValueError(f"regulariser {self.regulariser!r} is not one of {', '.join(REGULARISERS)}")

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        return self.drop == 0

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()) -> KaSA:
        here = super().at(site, m, n, clip, roles)
        most = min(m, n) - 1
        drop = min(here._rank, most) if self.drop is None else self.drop
        if drop > most and not clip:
            raise ValueError(f"drop {drop} is outside [0, {most}] at {site} ({m}x{n}): one triplet has to stay")
        return dataclasses.replace(here, drop=min(drop, most))

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        draws = generator(given.seed)
        uniform = torch.rand(*batch, self._rank, n, generator=draws, dtype=torch.float64)
        tensors = {
            "L": w.new_zeros(*batch, m, self._rank),
            "C": torch.randn(*batch, self._rank, generator=draws, dtype=torch.float64).to(w),
            "A": ((2 * uniform - 1) / math.sqrt(n)).to(w),
        }
        if self.drop:
            tail = minor_svd(w, self.drop, where=given.name)
            tensors |= {"U": tail.u, "sigma": tail.s, "V": tail.vh}
        return tensors

    def anchor(self, f: Factors) -> Product | None:
        return Product(f.U, f.sigma, f.V) if self.drop else None

    def update(self, f: Factors) -> Product:
        now, tail = self.now(f), self.anchor(f)
        if tail is None:
            return now
        # Not the difference of one product now and at the start: the two have nothing in common, nor a common scale.
        return Product(torch.cat([now.cored() * now.scale, -tail.cored()], -1), None, torch.cat([now.A, tail.A], -2))

    def penalty(self, sites: Sequence[Factors]) -> Tensor | None:
        if self.beta == 0 and self.gamma == 0:
            return None
        terms = [self.beta * f.C.square().sum() for f in sites]
        q = bases(sites)
        for group in by_shape(q):
            error = orthonormality_error(torch.stack([q[i] for i in group]))
            if self.regulariser == "reference":
                # ‖QQᵀ − I_m‖² = ‖QᵀQ − I_r‖² + (m − r): the larger Gram matrix need not be built.
                m, r = q[group[0]].shape[-2:]
                error = torch.linalg.vector_norm(torch.stack([error, torch.full_like(error, math.sqrt(m - r))]), dim=0)
            terms.append(self.gamma * error.sum())
        total = torch.stack(terms).sum()
        return total / sum(f.C[..., 0].numel() for f in sites) if self.regulariser == "reference" else total

    def export_rank(self, m: int, n: int) -> int:
        return min(self._rank + (self._rank if self.drop is None else self.drop), m, n)
