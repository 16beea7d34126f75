"""SHiRA: train a few entries of the weight itself, drawn once.

    W' = W0 + S        S = values at K = min(r (m + n), m n) entries that are drawn once, 0 elsewhere    values = 0

K. Bhardwaj, N. P. Pandey, S. Priyadarshi, V. Ganapathy, S. Kadambi, R. Esteves, S. Borse, P. Whatmough, R. Garrepalli,
M. Van Baalen, H. Teague, M. Nagel. Sparse High Rank Adapters. NeurIPS 2024, arXiv:2406.13175.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.methods.base import Factors, Given, Reference, Tensors, Transform, generator
from svdpeft.patterns import chosen
from svdpeft.registry import METHODS


@METHODS.register("shira")
@dataclass(frozen=True)
class SHiRA(Transform):
    """A sparse update of high rank: one or two in a hundred entries of a weight change, all others stay as they are.

    When to use:
        Where adapters are switched often, since one is switched by writing a few entries, or where several are added
        up: they hardly meet. It has the count of values of a LoRA of rank r. Every forward builds one m×n matrix, and
        no LoRA file can hold the result.

    Paper and code:
        The paper has five masks, of rows and columns, random, and by the size of weights, of gradients and of their
            product; the random one is here, and ``SVFT`` has others in the basis of the singular vectors.
        PEFT draws another mask at every start unless ``random_seed`` is set; here it follows the adapter's seed and is
            written into its file.

    Args:
        rank: r, of the LoRA that has as many values, or a mapping from site pattern to r; ``clip_rank`` lowers it to
            what the matrix has entries for.

    Example:
        >>> SHiRA(rank=8).count(1, 4096, 1024)  # as a LoRA of this rank
        40960
    """

    rank: int | Mapping[str, int] = 8

    trains: ClassVar = ("values",)
    resolved: ClassVar = ("rank",)
    draws: ClassVar = True
    learning_rates: ClassVar = {"vision": 3e-3, "language": 5e-4}
    latex: ClassVar[str] = r"W' = W_0 + S,\quad S \ \mathrm{sparse\ on\ a\ fixed\ mask},\quad S_0 = 0"
    reference: ClassVar = Reference(
        key="bhardwaj2024shira",
        authors="Bhardwaj, Kartikeya and Pandey, Nilesh Prasad and Priyadarshi, Sweta and Ganapathy, Viswanath and "
        "Kadambi, Shreya and Esteves, Rafael and Borse, Shubhankar and Whatmough, Paul and Garrepalli, Risheek and "
        "Van Baalen, Mart and Teague, Harris and Nagel, Markus",
        title="Sparse High Rank Adapters",
        year=2024,
        venue="Advances in Neural Information Processing Systems",
        arxiv="2406.13175",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rank, int) and self.rank < 1:
            raise ValueError(f"rank {self.rank} is below 1")

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()) -> SHiRA:
        rank, most = chosen(self.rank, site, roles), max(m * n // (m + n), 1)
        if rank > most and not clip:
            raise ValueError(
                f"rank {rank} at {site} ({m}x{n}) is {rank * (m + n)} of {m * n} entries: at most {most}; "
                "clip_rank=True lowers it there"
            )
        return dataclasses.replace(self, rank=min(rank, most))

    def _entries(self, m: int, n: int) -> int:
        """K."""
        return min(self._rank * (m + n), m * n)

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        index = torch.randperm(m * n, generator=generator(given.seed))[: self._entries(m, n)].sort().values
        return {"values": w.new_zeros(*batch, len(index)), "index": index.to(w.device)}

    def count(self, batch: int, m: int, n: int) -> int:
        """min(r (m + n), m n) per matrix."""
        return batch * self._entries(m, n)

    def delta(self, f: Factors, w0: Tensor) -> Tensor:
        values = f.values.to(w0.dtype)
        flat = values.new_zeros(*values.shape[:-1], w0.shape[-2] * w0.shape[-1])
        return flat.index_copy(-1, f.index, values).unflatten(-1, w0.shape[-2:])

    def absolute(self, f: Factors, w0: Tensor) -> Tensor:
        return self.delta(f, w0).abs()
