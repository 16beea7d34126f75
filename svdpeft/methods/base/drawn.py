"""Starts that are drawn: of a generator of the CPU, in float64, so that a seed means the same on every device."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def kaiming(*shape: int, source: torch.Generator) -> Float[Tensor, "*b m n"]:
    """Return values of U(−1/√n, 1/√n), n the last size: what ``kaiming_uniform_(a=√5)`` draws.

    Example:
        >>> bool(kaiming(3, 100, source=torch.Generator().manual_seed(0)).abs().max() <= 0.1)
        True
    """
    return (2 * torch.rand(shape, generator=source, dtype=torch.float64) - 1) / math.sqrt(shape[-1])


def orthonormal(*shape: int, source: torch.Generator) -> Float[Tensor, "*b m r"]:
    """Return a matrix with orthonormal columns, m >= r, uniformly distributed: the Q of a normal matrix, R_ii > 0.

    Example:
        >>> q = orthonormal(5, 2, source=torch.Generator().manual_seed(0))
        >>> torch.allclose(q.mT @ q, torch.eye(2, dtype=torch.float64))
        True
    """
    q, r = torch.linalg.qr(torch.randn(shape, generator=source, dtype=torch.float64))
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)
