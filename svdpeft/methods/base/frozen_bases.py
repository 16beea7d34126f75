"""What the methods share that keep the singular vectors of a weight and train what stands between them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from svdpeft.decomposition import Band, Product
from svdpeft.methods.base.factored import Decomposed, Unscaled
from svdpeft.methods.base.factors import Factors, Tensors
from svdpeft.methods.base.given import Given


@dataclass(frozen=True)
class FrozenBases(Decomposed, Unscaled):
    """W' = W0 + U_r (C − Σ_r) V_rᵀ with frozen U_r, Σ_r, V_r: a method says what C − Σ_r is.

    It is asked for the difference and not for C, so that a small change of a large σ is not rounded away.
    """

    anchored: ClassVar = False  # Σ_r is kept itself, under its own name

    @abstractmethod
    def change(self, f: Factors) -> Float[Tensor, "*b r"] | Float[Tensor, "*b r r"] | Band:
        """Return C − Σ_r, a diagonal (*b, r), a matrix (*b, r, r) or a band of it: exactly zero at the start."""

    def bases(self, w: Float[Tensor, "*b m n"], given: Given) -> Tensors:
        """What is frozen: L = U_r, sigma = the diagonal of Σ_r, A = V_rᵀ."""
        u, s, vh = self.svd(w, given)
        return {"L": u, "sigma": s, "A": vh}

    def core(self, f: Factors) -> Float[Tensor, "*b r"] | Float[Tensor, "*b r r"] | Band:
        change = self.change(f)
        if isinstance(change, Band):
            return change.plus(f.sigma)
        return change + (f.sigma if change.ndim == f.sigma.ndim else torch.diag_embed(f.sigma))

    def anchor(self, f: Factors) -> Product:
        return Product(f.L, f.sigma, f.A)

    def update(self, f: Factors) -> Product:
        return Product(f.L, self.change(f), f.A)

    def replaces_weight(self, m: int, n: int) -> bool:
        return self._rank == min(m, n)
