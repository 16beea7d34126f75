"""Rotations from skew-symmetric matrices: one sign convention for every method.

    R = (I + Q)(I − Q)⁻¹        Q = −Qᵀ, so RᵀR = I; Q = 0 is R = I

A. Cayley, 1846. The Neumann form replaces (I − Q)⁻¹ by I + Q + … + Q^k: cheaper, and orthogonal only for small Q.
"""

from __future__ import annotations

import torch
from torch import Tensor


def skew(values: Tensor, size: int) -> Tensor:
    """Write size(size − 1)/2 values below the diagonal of a skew-symmetric matrix, row by row.

    Args:
        values: (*b, size(size − 1)/2).
        size: of the matrix.

    Returns:
        Q, (*b, size, size), differentiable in ``values``.

    Example:
        >>> skew(torch.tensor([1.0, 2.0, 3.0]), 3)
        tensor([[ 0., -1., -2.],
                [ 1.,  0., -3.],
                [ 2.,  3.,  0.]])
    """
    i, j = torch.tril_indices(size, size, -1, device=values.device)
    lower = values.new_zeros(*values.shape[:-1], size * size)
    lower = lower.index_copy(-1, i * size + j, values).unflatten(-1, (size, size))
    return lower - lower.mT


def cayley(q: Tensor) -> Tensor:
    """Return (I + Q)(I − Q)⁻¹ of skew-symmetric Q, (*b, r, r), by one solve; never singular, exact at Q = 0.

    Example:
        >>> r = cayley(skew(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64), 3))
        >>> torch.allclose(r.mT @ r, torch.eye(3, dtype=torch.float64))
        True
    """
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    # (I + Q) and (I − Q)⁻¹ commute. No check for a singular matrix: there is none, and it would synchronise.
    return torch.linalg.solve_ex((eye - q).expand_as(q), eye + q).result


def cayley_neumann(q: Tensor, terms: int) -> Tensor:
    """Return (I + Q)(I + Q + … + Q^terms): without a solve, and orthogonal up to the first power left out.

    Example:
        >>> cayley_neumann(torch.zeros(2, 2), terms=5)
        tensor([[1., 0.],
                [0., 1.]])
    """
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    series = eye.expand_as(q)
    for _ in range(terms):  # Horner: I + Q(I + Q(…))
        series = eye + q @ series
    return (eye + q) @ series
