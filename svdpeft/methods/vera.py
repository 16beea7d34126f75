"""VeRA: one random low-rank pair for the whole model; each site trains two vectors that scale it.

    W' = W0 + diag(b) B diag(d) A        b = 0    d = 0.1    A, B ~ U(−√(6/fan in), √(6/fan in)), frozen

A (r, largest n) and B (largest m, r) are drawn once for all sites of one rank; a site takes their first n columns and
first m rows. Those are the same numbers whatever other sites there are, up to the fan-in of A: the largest n.

D. J. Kopiczko, T. Blankevoort, Y. M. Asano. VeRA: Vector-based Random Matrix Adaptation. ICLR 2024, arXiv:2310.11454.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.decomposition import Product
from svdpeft.methods.base import Factors, Given, Reference, Tensors, Unscaled, generator
from svdpeft.registry import METHODS


@METHODS.register("vera")
@dataclass(frozen=True)
class VeRA(Unscaled):
    """Two vectors per site on a random basis that the whole model shares.

    When to use:
        Where the adapter must be tiny and many are kept: m + r values per weight, about half of LoRA's at rank 1
        on a square one. A random basis knows nothing of the weight, so r has to be large (256 and more) and the
        learning rate about ten times that of LoRA; every forward pays for that r. A file holds the shared pair once.
        Sites of another attachment get another pair: to add a larger layer later, attach it under its own name.

    Paper and code:
        The paper says Kaiming initialisation; the bound √(6/fan in) of A and of B is that of Hugging Face PEFT.

    Args:
        rank: r, or a mapping from site pattern to r; may exceed min(m, n).
        d_initial: d at the start.

    Example:
        >>> VeRA(rank=256).count(1, 768, 768)
        1024
    """

    rank: int | dict[str, int] | None = 256
    d_initial: float = 0.1

    learning_rates: ClassVar = {"vision": 3e-2, "language": 1e-2}
    trains: ClassVar[tuple[str, ...]] = ("b", "d")
    anchored: ClassVar[bool] = False
    reference: ClassVar = Reference(
        key="kopiczko2024vera",
        authors="Kopiczko, Dawid J. and Blankevoort, Tijmen and Asano, Yuki M.",
        title="VeRA: Vector-based Random Matrix Adaptation",
        year=2024,
        venue="International Conference on Learning Representations",
        arxiv="2310.11454",
    )
    draws: ClassVar = True
    latex: ClassVar[str] = r"W' = W_0 + \operatorname{diag}(b)\, B \operatorname{diag}(d)\, A"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_initial == 0:
            raise ValueError("d_initial 0: with b = 0 as well no gradient would ever arrive; the paper takes 0.1")

    def rank_limit(self, m: int, n: int) -> None:
        return None

    def group(self, given: Given) -> str:
        return f"vera r={self._rank}"

    def share(self, group: Sequence[Given]) -> Tensors:
        m, n = (max(site.shape[axis] for site in group) for axis in (1, 2))
        random, given = generator(group[0].seed_of(self.group(group[0]))), group[0]
        # Drawn row by row, each from a stream of its own: a larger layer adds rows and leaves the others as they are.
        streams = [generator(int(seed)) for seed in torch.randint(2**31, (2,), generator=random)]
        a, b = (
            2 * torch.rand(rows, self._rank, generator=stream, dtype=torch.float64) - 1
            for rows, stream in zip((n, m), streams, strict=True)
        )
        a, b = a.mT.contiguous() * math.sqrt(6 / n), b * math.sqrt(6 / self._rank)
        return {"A": a.to(given.device, given.dtype), "B": b.to(given.device, given.dtype)}

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, _ = w.shape
        return {"b": w.new_zeros(*batch, m), "d": w.new_full((*batch, self._rank), self.d_initial)}

    def core(self, f: Factors) -> Tensor:
        return f.d

    def now(self, f: Factors) -> Product:
        _, m, n = f.shape
        return Product(f.b.unsqueeze(-1) * f.B[:m], f.d, f.A[:, :n].expand(*f.d.shape, n))

    def count(self, batch: int, m: int, n: int) -> int:
        """m + r per matrix."""
        return batch * (m + self._rank)
