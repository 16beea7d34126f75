"""SVF of Transformer²: scale each singular value by a trained factor.

    W' = W0 + U (Σ diag(z) − Σ) Vᵀ = U Σ diag(z) Vᵀ        z = 1 at the start

Q. Sun, E. Cetin, Y. Tang. Transformer-Squared: Self-adaptive LLMs. ICLR 2025, arXiv:2501.06252.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.methods.base import Factors, Given, Reference, Tensors, generator
from svdpeft.methods.base.frozen_bases import FrozenBases
from svdpeft.registry import METHODS


@METHODS.register("svf-transformer2")
@dataclass(frozen=True)
class SVFTransformer2(FrozenBases):
    """Expert vectors z, one factor per singular value: a step moves σ in proportion to its size.

    The same weights can be reached as with SVF; what differs is which direction is easy. Here a large σ moves far and
    a small one hardly, and a σ of zero never.

    When to use:
        Small composable experts: vectors z of several tasks can be mixed, z = Σ aᵢ zᵢ, and a training by
        reinforcement has few values to explore. U and V are stored beside the weight, twice the size of a
        square one. Where new directions are needed it falls short, like SVF.

    Paper and code:
        The code trains p with z = sigmoid(p), drawn around p = 0.1, and multiplies U diag(σ z) Vᵀ by Σσ / Σ(σ z), so
        that the sum of all singular values stays what it was: ``reference_init=True``. The model then starts about
        half a percent away from the base, and a uniform change of all p changes nothing.
        The code adapts the MLP weights alone, trained by REINFORCE: ``targets=`` and the loss are the user's.

    Args:
        rank: number of leading singular values that train, or a mapping from site pattern to it; ``None`` is all,
            as published.
        driver: of the decomposition; at full rank always exact.
        reference_init: z = sigmoid(p) Σσ / Σ(σ sigmoid(p)) with p ~ N(0.1, 0.01²), as in the official code; p is what
            trains, under the name z. Of the code's settings the largest factor is 1, and p is kept in float32.
    """

    rank: int | dict[str, int] | None = None
    reference_init: bool = False

    learning_rates: ClassVar = {"vision": 3e-2, "language": 2e-2}
    trains: ClassVar = ("z",)
    latex: ClassVar[str] = r"W' = W_0 + U\,\Sigma\,(\mathrm{diag}(z) - I)\,V^\top,\quad z_0 = 1"
    reference: ClassVar = Reference(
        key="sun2025transformer2",
        authors="Sun, Qi and Cetin, Edoardo and Tang, Yujin",
        title="Transformer-Squared: Self-adaptive LLMs",
        year=2025,
        venue="International Conference on Learning Representations",
        arxiv="2501.06252",
    )

    @property
    def draws(self) -> bool:  # type: ignore[override]
        return self.reference_init

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        return not self.reference_init

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()):
        method = super().at(site, m, n, clip, roles)
        if self.reference_init and method.rank == 1:
            raise ValueError(
                f"rank 1 at {site} ({m}x{n}): with reference_init the sum of the singular values stays what it was, so "
                "a single one never changes; exclude the site"
            )
        return method

    def start(self, w: Tensor, given: Given) -> Tensors:
        tensors = self.bases(w, given)
        z = torch.ones_like(tensors["sigma"])
        if self.reference_init:
            noise = torch.randn(z.shape, generator=generator(given.seed), dtype=torch.float64)
            z = (0.1 + 0.01 * noise).to(w)
        return tensors | {"z": z}

    def change(self, f: Factors) -> Tensor:
        if not self.reference_init:
            return f.sigma * (f.z - 1)
        mask = torch.sigmoid(f.z)
        kept = f.sigma.sum(-1, keepdim=True) / (f.sigma * mask).sum(-1, keepdim=True)
        return f.sigma * (mask * kept - 1)

    def count(self, batch: int, m: int, n: int) -> int:
        """r per matrix, min(m, n) with the default."""
        return batch * self._rank
