"""Both bases of every site of a method, and how far they are from orthonormal: for regularisers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from svdpeft.decomposition.orthonormality import orthonormality_error
from svdpeft.methods.base.factors import Factors, by_shape


def bases(sites: Sequence[Factors], of: Callable[[Tensor], Tensor] = lambda p: p) -> list[Tensor]:
    """Both bases of every site with their vectors as columns: L (*b, m, r) and Aᵀ (*b, n, r), as views."""
    return [q for f in sites for q in (of(f.L), of(f.A).mT)]


def errors(sites: Sequence[Factors], norm: str = "frobenius") -> Float[Tensor, " count"]:
    """Return the orthonormality errors of all bases, one after the other, grouped by shape."""
    q = bases(sites)
    found = [orthonormality_error(torch.stack([q[i] for i in group]), norm).flatten() for group in by_shape(q)]
    return torch.cat([error.to(q[0].device) for error in found])
