"""Minor: train the smallest singular triplets.

W' = W0 + L A − [L A]start        L₀ = U √Σ    A₀ = √Σ Vᵀ    of the r smallest singular values
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from svdpeft.decomposition import minor_svd
from svdpeft.methods.base import Factored, Given, Tensors
from svdpeft.registry import METHODS


@METHODS.register("minor")
@dataclass(frozen=True)
class Minor(Factored):
    """The trailing triplets in the place of the leading ones."""

    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}

    def start(self, w: Tensor, given: Given) -> Tensors:
        u, s, vh = minor_svd(w, self.rank, where=given.name)
        return {"L": u * s.sqrt().unsqueeze(-2), "A": s.sqrt().unsqueeze(-1) * vh}
