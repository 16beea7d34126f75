"""SVFT: train a sparse core between the weight's own, frozen singular vectors.

    W' = W0 + U M Vᵀ = U (Σ + M) Vᵀ        M = 0 at the start, trainable on a fixed pattern

    plain      the diagonal
    banded     |i − j| <= d
    random     K(d) different positions drawn from the seed
    topk       the K(d) largest |⟨u_i, v_j⟩|;  for m ≠ n both vectors are cut to their first min(m, n) coordinates

    K(d) = k(2d+1) − d(d+1), k = rank: all patterns but the plain one have the size of the band.

V. Lingam, A. Tejaswi, A. Vavre, A. Shetty, G. K. Gudur, J. Ghosh, A. Dimakis, E. Choi, A. Bojchevski, S. Sanghavi.
SVFT: Parameter-Efficient Fine-Tuning with Singular Vectors. NeurIPS 2024, arXiv:2405.19597.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdpeft.decomposition import Band, band_count, band_index, random_index, scatter_core, top_index
from svdpeft.methods.base import Factors, Given, Reference, Tensors, generator
from svdpeft.methods.base.frozen_bases import FrozenBases
from svdpeft.registry import METHODS

PATTERNS = ("plain", "banded", "random", "topk")


@METHODS.register("svft")
@dataclass(frozen=True)
class SVFT(FrozenBases):
    """A few coefficients between all of the weight's own singular vectors, which stay as they are.

    When to use:
        Where very few trained values count, in a file and in the optimizer's state, and for full-rank updates at a
        small budget. It pays in memory: U and V are as large as the weight, and the step is slower than LoRA's. A file
        need not have them. Learning rates are several times LoRA's.

    Paper and code:
        The official start is not the base model: M is Kaiming-normal times a trained sigmoid gate
        (``reference_init=True``); here M = 0 and there is no gate.
        The official random pattern draws positions with replacement, its top-k ranks signed entries of U·V instead of
        |⟨u_i, v_j⟩| (both with ``reference_init=True``).
        The official code throws away what a truncated rank leaves out; here it stays in the weight, always.
        For m ≠ n the paper takes full square bases; here, as in the code, the thin SVD.

    Args:
        rank: k, the number of triplets kept, or a mapping from site pattern to k; ``None`` keeps all min(m, n).
            What a smaller rank leaves out stays in the weight.
        pattern: of the trainable entries of M.
        off_diagonals: d of the band whose size every pattern but the plain one takes.
        reference_init: start as the official code does, off the base model: M is Kaiming-normal times a trained
            sigmoid gate (0.7 in Frobenius norm per site whatever its size), random positions are drawn with
            replacement, top-k takes the largest signed entries of U·V, or of the square factor where m ≠ n.
        driver: of the decomposition; at full rank always exact.
    """

    rank: int | dict[str, int] | None = None
    pattern: Literal["plain", "banded", "random", "topk"] = "plain"
    off_diagonals: int = 2
    reference_init: bool = False

    learning_rates: ClassVar = {"vision": 3e-2, "language": 2e-2}
    latex: ClassVar[str] = r"W' = W_0 + U M V^\top = U(\Sigma + M)V^\top,\qquad M_0 = 0\ \mathrm{on\ a\ fixed\ pattern}"
    reference: ClassVar = Reference(
        key="lingam2024svft",
        authors="Lingam, Vijay and Tejaswi, Atula and Vavre, Aditya and Shetty, Aneesh and Gudur, Gautham Krishna and "
        "Ghosh, Joydeep and Dimakis, Alex and Choi, Eunsol and Bojchevski, Aleksandar and Sanghavi, Sujay",
        title="SVFT: Parameter-Efficient Fine-Tuning with Singular Vectors",
        year=2024,
        venue="Advances in Neural Information Processing Systems",
        arxiv="2405.19597",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern {self.pattern!r} is not one of {', '.join(PATTERNS)}")
        if self.off_diagonals < 0:
            raise ValueError(f"off_diagonals {self.off_diagonals} is negative; 0 is the diagonal alone")

    @property
    def draws(self) -> bool:  # type: ignore[override]
        return self.pattern == "random" or self.reference_init

    @property
    def trains(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("C", "gate") if self.reference_init else ("C",)

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        return not self.reference_init

    @property
    def knob(self) -> str:  # type: ignore[override]
        return "rank" if self.pattern == "plain" else "off_diagonals"

    def start(self, w: Tensor, given: Given) -> Tensors:
        batch, tensors = w.shape[:-2], self.bases(w, given)
        u, vh = tensors["L"], tensors["A"]
        count = self._rank
        if self.pattern != "plain":
            tensors["index"] = self._index(u, vh, given.seed).to(u.device)
            count = tensors["index"].shape[-1]
        tensors["C"] = w.new_zeros(*batch, count)
        if self.reference_init:
            kaiming = torch.randn(*batch, count, generator=generator(given.seed), dtype=torch.float64)
            tensors["C"] = (kaiming * math.sqrt(2 / count)).to(w)
            tensors["gate"] = w.new_zeros(*batch, 1)
        return tensors

    def _index(self, u: Tensor, vh: Tensor, seed: int) -> Tensor:
        k, count = self._rank, band_count(self._rank, self.off_diagonals)
        if self.pattern == "banded":
            return band_index(k, self.off_diagonals)
        if self.pattern == "random":
            if self.reference_init:  # rows and columns apart, so that some positions come twice and add up
                rows, columns = torch.randint(k, (2, count), generator=generator(seed))
                return rows * k + columns
            return random_index(k, count, generator(seed))
        m, n = u.shape[-2], vh.shape[-1]
        if self.reference_init:
            score = u @ vh.mT if m == n == k else (u if m == k else vh)[..., :k, :k]
        else:
            shared = min(m, n)
            score = (u[..., :shared, :].mT @ vh[..., :shared].mT).abs()  # (*b, k, k): |⟨u_i, v_j⟩|
        return top_index(score, count)

    def change(self, f: Factors) -> Tensor | Band:
        values = f.C * torch.sigmoid(f.gate) if self.reference_init else f.C
        if self.pattern == "banded":
            return Band.of(values, f.index, self._rank, self.off_diagonals)
        return values if self.pattern == "plain" else scatter_core(values, f.index, self._rank)

    def count(self, batch: int, m: int, n: int) -> int:
        """K(d) per matrix, k for the plain pattern; one gate more in the official code."""
        entries = self._rank if self.pattern == "plain" else band_count(self._rank, self.off_diagonals)
        return batch * (entries + self.reference_init)

    def export_rank(self, m: int, n: int) -> int:
        return min(self._rank, self.count(1, m, n))
