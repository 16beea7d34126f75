"""MiCA: a low-rank update whose output factor is frozen at the weight's minor left singular vectors.

    W' = W0 + s L A        L = U_−r, frozen    A = 0    s = α/r

S. Rüdiger, S. Raschka. MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning. arXiv:2604.01694.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdpeft.decomposition import minor_svd
from svdpeft.methods.base import Given, Reference, Tensors, Triplets
from svdpeft.registry import METHODS

BASES = ("thin", "full")


@METHODS.register("mica")
@dataclass(frozen=True)
class MiCA(Triplets):
    """Writes only into output directions that the weight hardly uses.

    When to use:
        For new knowledge beside the old, as in continued pre-training: outputs change along directions in which the
        base has next to no energy, with about half the values of LoRA at one rank. Those directions cannot turn, so
        a task that needs the principal ones is out of reach. Its authors advise half of LoRA's rank and twice its
        learning rate. The start takes a whole SVD of every weight.

    Paper and code:
        The paper writes a square weight, and for m > n leaves open which vectors are the last. The authors' code in
        Hugging Face PEFT takes them from the thin SVD (``basis="thin"``); of the full one they span the null space
        of W0ᵀ as long as r <= m − n (``basis="full"``).

    Args:
        basis: whose last r left vectors are taken: ``"thin"``, the min(m, n) of the thin SVD, or ``"full"``, all m.
    """

    basis: Literal["thin", "full"] = "thin"

    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    trains: ClassVar = ("A",)
    anchored: ClassVar[bool] = False
    pruned: ClassVar[tuple[str, ...]] = ("A",)
    latex: ClassVar[str] = r"W' = W_0 + s\,U_{-r} A,\quad A_0 = 0"
    reference: ClassVar = Reference(
        key="rudiger2026mica",
        authors="Rüdiger, Sten and Raschka, Sebastian",
        title="MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning",
        year=2026,
        arxiv="2604.01694",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.basis not in BASES:
            raise ValueError(f"basis {self.basis!r} is not one of {', '.join(BASES)}")

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        u = minor_svd(w, self._rank if self.basis == "thin" else min(m, n), where=given.name).u
        if self.basis == "full":
            rest = torch.linalg.qr(u, mode="complete").Q[..., min(m, n) :]  # (*b, m, m − k), orthonormal to all of U
            u = torch.cat([u, rest], -1)[..., -self._rank :].contiguous()
        return {"L": u, "A": w.new_zeros(*batch, self._rank, n)}
