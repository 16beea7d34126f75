"""Rotations from skew-symmetric matrices: one sign convention for every method.

    R = (I + Q)(I − Q)⁻¹        Q = −Qᵀ, so RᵀR = I; Q = 0 is R = I, and −Q is Rᵀ

A. Cayley, 1846. The Neumann form replaces (I − Q)⁻¹ by I + Q + … + Q^k: cheaper, and orthogonal only for small Q.

Each comes as the rotation and as its distance from the identity, R − I, which is formed without a subtraction: where a
method adds L (R − I) A to a weight, that is exactly zero at Q = 0 and keeps all its digits for a small Q. Both are
computed in float32 at least, under autocast too.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from svdpeft.decomposition.precision import full_precision

TERMS = 1000  # of a Neumann series, at most: each is a product, and a solve is cheaper long before


def skew_count(size: int) -> int:
    """Number of free values of a skew-symmetric matrix, size(size − 1)/2.

    Example:
        >>> skew_count(1), skew_count(4)
        (0, 6)
    """
    return size * (size - 1) // 2


def skew(values: Float[Tensor, "*b k"], size: int) -> Float[Tensor, "*b {size} {size}"]:
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


def cayley(q: Float[Tensor, "*b r r"]) -> Float[Tensor, "*b r r"]:
    """Return (I + Q)(I − Q)⁻¹ of skew-symmetric Q, (*b, r, r), by one solve; never singular, exact at Q = 0.

    Example:
        >>> r = cayley(skew(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64), 3))
        >>> torch.allclose(r.mT @ r, torch.eye(3, dtype=torch.float64))
        True
    """
    return _identity(q) + cayley_offset(q)


def cayley_offset(q: Float[Tensor, "*b r r"]) -> Float[Tensor, "*b r r"]:
    """Return R − I = 2Q(I − Q)⁻¹ of the Cayley rotation.

    Example:
        >>> cayley_offset(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))  # a quarter turn
        tensor([[-1., -1.],
                [ 1., -1.]])
    """
    with full_precision(q):
        wide = _wide(q)
        # Q and (I − Q)⁻¹ commute. No check for a singular matrix: there is none, and it would synchronise.
        return (2 * torch.linalg.solve_ex(_identity(wide) - wide, wide).result).to(q.dtype)


def cayley_neumann(q: Float[Tensor, "*b r r"], terms: int) -> Float[Tensor, "*b r r"]:
    """Return (I + Q)(I + Q + … + Q^terms): without a solve, and orthogonal up to the first power left out.

    Example:
        >>> cayley_neumann(torch.zeros(2, 2), terms=5)
        tensor([[1., 0.],
                [0., 1.]])
    """
    return _identity(q) + cayley_neumann_offset(q, terms)


def cayley_neumann_offset(q: Float[Tensor, "*b r r"], terms: int) -> Float[Tensor, "*b r r"]:
    """Return R − I = 2Q + 2Q² + … + 2Q^terms + Q^(terms + 1) of the Neumann form.

    Example:
        >>> cayley_neumann_offset(torch.tensor([[0.0, -1.0], [1.0, 0.0]]), terms=1)
        tensor([[-1., -2.],
                [ 2., -1.]])
    """
    with full_precision(q):
        wide = _wide(q)
        series = wide
        for _ in range(terms):  # Horner: 2Q + Q(2Q + Q(… + Q))
            series = 2 * wide + wide @ series
        return series.to(q.dtype)


def _identity(q: Tensor) -> Tensor:
    return torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)


def _wide(q: Tensor) -> Tensor:
    return q.to(torch.promote_types(q.dtype, torch.float32))
