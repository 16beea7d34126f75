"""TinyLoRA: a handful of numbers, spread over the core of the leading triplets by fixed random matrices.

    W' = W0 + L (Σᵢ vᵢ Pᵢ) A        L = U_r Σ_r    A = V_rᵀ    v = 0    Pᵢ ~ N(0, 1/r), frozen

v (u numbers) is a matrix's own, or one for several sites. Pᵢ (r×r) is drawn per site from its seed.

J. X. Morris, N. Mireshghallah, M. Ibrahim, S. Mahloujifar. Learning to Reason in 13 Parameters. 2026,
arXiv:2602.04118.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdpeft.methods.base import Decomposed, Factors, Given, Reference, Tensors, Unscaled, generator
from svdpeft.registry import METHODS


@METHODS.register("tinylora")
@dataclass(frozen=True)
class TinyLoRA(Decomposed, Unscaled):
    """Down to a single trained number for the whole model.

    When to use:
        For reinforcement learning of a large model, where the paper gets most of the gain from 13 numbers, and to see
        how little a task needs. By its own account supervised training needs updates 100 to 1000 times larger: take
        LoRA-XS or LoRA there. More than r² numbers per site are redundant, since the core has no more.

    Paper and code:
        The paper does not say how P is drawn; N(0, 1/r) is what Hugging Face PEFT takes.
        PEFT gives √Σ_r to both sides where the paper has U_r Σ_r: split="both".
        PEFT ties by a fraction of the sites, which comes out as tie= consecutive sites each; it has no "type".
        PEFT caps r at min(m, n) in silence: clip_rank=True.

    Args:
        u: numbers in v.
        tie: 1: each matrix has its own v; a larger number: as many consecutive sites share one; ``"type"``: the sites
            of one name in all blocks do; ``"all"``: all sites of the rule do.
        split: ``"left"``: Σ_r beside U_r. ``"both"``: √Σ_r on either side.

    Example:
        >>> TinyLoRA(u=13, tie="all").count(1, 4096, 4096)
        0
    """

    rank: int | dict[str, int] | None = 2
    u: int = 64
    tie: int | Literal["type", "all"] = 1
    split: Literal["left", "both"] = "left"

    learning_rates: ClassVar = {"vision": 1e-3, "language": 2e-4}
    trains: ClassVar[tuple[str, ...]] = ("v",)
    anchored: ClassVar[bool] = False
    knob: ClassVar[str] = "u"
    reference: ClassVar = Reference(
        key="morris2026tinylora",
        authors="Morris, John X. and Mireshghallah, Niloofar and Ibrahim, Mark and Mahloujifar, Saeed",
        title="Learning to Reason in 13 Parameters",
        year=2026,
        arxiv="2602.04118",
    )
    draws: ClassVar = True
    latex: ClassVar[str] = r"W' = W_0 + U_r \Sigma_r \Bigl(\sum_{i=1}^{u} v_i P_i\Bigr) V_r^\top"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.u < 1:
            raise ValueError(f"u {self.u} is not positive: at least one number trains")
        if self.tie not in ("type", "all") and (not isinstance(self.tie, int) or self.tie < 1):
            raise ValueError(f"tie {self.tie!r} is neither a number of sites (1: each its own), 'type' nor 'all'")
        if self.split not in ("left", "both"):
            raise ValueError(f"split {self.split!r} is neither 'left' nor 'both'")

    def group(self, given: Given) -> str | None:
        if self.tie == 1:
            return None
        if isinstance(self.tie, int):
            return str(given.position // self.tie)
        return given.module_type() if self.tie == "type" else "all"

    def share(self, group: Sequence[Given]) -> Tensors:
        return {"v": torch.zeros(self.u, dtype=group[0].dtype, device=group[0].device)}

    def start(self, w: Tensor, given: Given) -> Tensors:
        batch, r = w.shape[:-2], self._rank
        u, s, vh = self.svd(w, given)
        random = torch.randn(*batch, self.u, r, r, generator=generator(given.seed), dtype=torch.float64)
        left, right = (s, torch.ones_like(s)) if self.split == "left" else (s.sqrt(), s.sqrt())
        tensors = {"L": u * left.unsqueeze(-2), "A": right.unsqueeze(-1) * vh, "P": (random / math.sqrt(r)).to(w)}
        return tensors | ({"v": w.new_zeros(*batch, self.u)} if self.tie == 1 else {})

    def core(self, f: Factors) -> Tensor:
        return torch.einsum("...u,...uij->...ij", f.v, f.P)

    def count(self, batch: int, m: int, n: int) -> int:
        """u per matrix, or per group of tied sites."""
        return batch * self.u if self.tie == 1 else 0

    def shared_count(self, group: Sequence[Given]) -> int:
        return self.u

    def knob_values(self, sites: Sequence[Given]) -> range:
        return range(1, max(max(site.shape[1:]) for site in sites) + 1)
