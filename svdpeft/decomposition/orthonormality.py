"""How far bases are from orthonormal, and the way back.

    E = QᵀQ − I        ‖E‖_F is the error;  ∂‖E‖_F = 2 Q E / ‖E‖_F        ∂‖E‖_F² = 4 Q E

Bases have their vectors as columns, (*b, m, r). The polar factor is the nearest orthonormal one (N. Higham, 1986).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def orthonormality_error(q: Float[Tensor, "*b m r"], norm: str = "frobenius") -> Float[Tensor, "*b"]:
    """Return ‖QᵀQ − I‖_F, or its square, of each basis.

    Args:
        q: bases with their vectors as columns, (*b, m, r).
        norm: ``"frobenius"`` or ``"squared"``.

    Returns:
        The errors, (*b,); exactly zero (and so without a gradient) below the rounding noise of the dtype.

    Example:
        >>> orthonormality_error(torch.tensor([[2.0], [0.0]]))
        tensor(3.)
    """
    error = torch.linalg.matrix_norm(_gram_error(q))
    error = torch.where(error > noise(q), error, torch.zeros_like(error))
    return error.square() if norm == "squared" else error


def orthonormality_gradient(q: Float[Tensor, "*b m r"], norm: str = "frobenius") -> Float[Tensor, "*b m r"]:
    """Return the gradient of ``orthonormality_error`` in closed form, without an autograd graph, (*b, m, r)."""
    e = _gram_error(q)
    size = torch.linalg.matrix_norm(e)[..., None, None]  # (*b, 1, 1)
    slope = torch.full_like(size, 4.0) if norm == "squared" else 2.0 / size
    return torch.where(size > noise(q), slope, torch.zeros_like(size)) * (q @ e)


def orthonormality_step(
    q: Float[Tensor, "*b m r"], gamma: Float[Tensor, ""] | float, norm: str = "frobenius"
) -> Float[Tensor, "*b m r"]:
    """Return −γ times the gradient, but never more than −½ Q E, (*b, m, r).

    That is the step of Newton and Schulz to the polar factor, Q(3I − QᵀQ)/2: a longer one leads away from it again.
    """
    e = _gram_error(q)
    size = torch.linalg.matrix_norm(e)[..., None, None]  # (*b, 1, 1)
    slope = (torch.full_like(size, 4.0) if norm == "squared" else 2.0 / size) * gamma
    return torch.where(size > noise(q), -slope.clamp(max=0.5), torch.zeros_like(size)) * (q @ e)


def noise(q: Float[Tensor, "*b m r"]) -> float:
    """‖QᵀQ − I‖_F of a basis that is orthonormal up to rounding: below this the direction means nothing."""
    return 10 * q.shape[-1] * torch.finfo(q.dtype).eps


def polar(q: Float[Tensor, "*b m r"]) -> Float[Tensor, "*b m r"]:
    """Return the nearest matrix with orthonormal columns, U Vᵀ of Q = U Σ Vᵀ, (*b, m, r)."""
    u, _, vh = torch.linalg.svd(q.to(torch.promote_types(q.dtype, torch.float32)), full_matrices=False)
    return (u @ vh).to(q.dtype)


def _gram_error(q: Float[Tensor, "*b m r"]) -> Float[Tensor, "*b r r"]:
    return q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
