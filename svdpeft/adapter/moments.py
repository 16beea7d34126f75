"""What the inputs of a layer say about its errors: which of two matrices is nearer in what the layer gives out.

    E‖E x‖² = ‖E K‖_F²        K² = E[x xᵀ]

So of all matrices of a rank U_r Σ_r V_rᵀ K⁻¹ is nearest, with W K = U Σ Vᵀ.

C. Zhang, J. T. H. Wong, C. Xiao, G. A. Constantinides, Y. Zhao. QERA: an Analytical Framework for Quantization Error
Reconstruction. ICLR 2025, arXiv:2410.06040.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from svdpeft.decomposition import Driver, truncated_svd
from svdpeft.methods.base import Statistics
from svdpeft.sites.site import Site

MOMENTS = ("full", "diagonal")
FLOOR = 1e-6  # of the largest eigenvalue of E[x xᵀ]: smaller ones are the rounding of sums in float32


class Moment(NamedTuple):
    """E[x xᵀ] of a site's inputs, (n, n), K and K⁻¹, float64."""

    second: Float[Tensor, "n n"]
    root: Float[Tensor, "n n"]
    inverse: Float[Tensor, "n n"]

    @classmethod
    def of(cls, site: Site, calibration: Mapping[str, Statistics], moments: str) -> Moment:
        """Return what a calibration saw of a linear site.

        Args:
            site: with one matrix.
            calibration: by the names of sites.
            moments: ``"full"``, or ``"diagonal"``, K = diag(√E[x_i²]).

        Raises:
            ValueError: it saw nothing of the site, or another layer.
        """
        found, n = calibration.get(site.name, Statistics()), site.shape[-1]
        if found.second is None or found.second.shape[-1] != n:
            what = "no inputs" if found.second is None else f"inputs of {found.second.shape[-1]} values"
            raise ValueError(f"the calibration saw {what} of {site.name}, which takes {n}: calibrate this very model")
        second = found.second.to(site.weight.original.device, torch.float64).reshape(n, n) / found.count
        if moments == "diagonal":
            values, vectors = second.diagonal(), torch.eye(n, dtype=second.dtype, device=second.device)
        else:
            values, vectors = torch.linalg.eigh(second)
        most = values.max()
        root = torch.where(most > 0, values.clamp(min=FLOOR * most), torch.ones_like(values)).sqrt()
        return cls(second, (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT)

    def nearest(self, w: Float[Tensor, "m n"], rank: int, driver: Driver, where: str) -> Float[Tensor, "m n"]:
        """Return the matrix of a rank whose outputs are nearest to those of w."""
        u, s, vh = truncated_svd(w.double() @ self.root, rank, driver, where=where)
        return ((u * s) @ (vh @ self.inverse)).to(w)

    def square(self, error: Float[Tensor, "m n"]) -> float:
        """Return E‖E x‖²."""
        error = error.double()
        return float(((error @ self.second) * error).sum())
