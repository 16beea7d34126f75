"""All singular triplets of a matrix, in float64.

By the eigenvectors of the smaller Gram matrix, which is as fast as LAPACK's SVD is in float32 and loses half of the
digits, of which float64 has twice as many as a float32 weight:

    W Wᵀ = U Σ² Uᵀ          V = Wᵀ U Σ⁻¹

Of a small σ fewer digits are left, (σ₁/σ)² of them are lost. So what is below ``SMALL`` σ₁ is taken out, and found in
a decomposition of its own, in which it is not small:

    W₂ = U₂ᵀ W (I − V₁V₁ᵀ)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Triplets = tuple[Float[Tensor, "*b m k"], Float[Tensor, "*b k"], Float[Tensor, "*b k n"]]
SMALL = 1e-2  # of the largest: where it is left with 12 of 16 digits


def full_svd(w: Float[Tensor, "*b m n"], where: str, wanted: torch.dtype) -> Triplets:
    """Return the thin SVD by the solver that suits, and where that does not converge, by another.

    Args:
        w: matrices, (*b, m, n), float64.
        where: name of the site, for the error message.
        wanted: what the triplets are rounded to.

    Raises:
        ValueError: no solver converges.
    """
    solvers: list[Callable[[Tensor], Triplets]] = [by_gram, _by_library]
    for solve in solvers if wanted == torch.float32 else reversed(solvers):
        try:
            return solve(w)
        except torch.linalg.LinAlgError:
            pass
    shape = "x".join(map(str, w.shape))
    raise ValueError(f"no solver could decompose {where} ({shape}), largest entry {w.abs().max():.3g}")


def by_gram(w: Float[Tensor, "*b m n"]) -> Triplets:
    """Return the thin SVD by the eigenvectors of the smaller Gram matrix; vectors of σ = 0 may be zero in V or U.

    Raises:
        LinAlgError: they are not found.

    Example:
        >>> u, s, vh = by_gram(torch.tensor([[3.0, 0.0], [0.0, 1e-9]], dtype=torch.float64))
        >>> s.tolist()
        [3.0, 1e-09]
    """
    *_, m, n = w.shape
    if m > n:
        v, s, uh = by_gram(w.mT)
        return uh.mT, s, v.mT
    u = torch.linalg.eigh(w @ w.mT).eigenvectors.flip(-1)  # (*b, m, m), by descending eigenvalue
    vh = u.mT @ w  # Σ Vᵀ
    s = torch.linalg.vector_norm(vh, dim=-1)  # (*b, m)
    known = m - int((s < SMALL * s[..., :1]).sum(-1).amax())
    vh[..., :known, :] /= s[..., :known, None].clamp(min=torch.finfo(s.dtype).tiny)
    if known == m:
        return u, s.cummin(-1).values, vh  # of equal ones a later one may be larger in the last digit
    rest = vh[..., known:, :]
    rest = rest - (rest @ vh[..., :known, :].mT) @ vh[..., :known, :]
    turn, small, right = by_gram(rest)
    return (
        torch.cat([u[..., :known], u[..., known:] @ turn], -1),
        torch.cat([s[..., :known], small], -1).cummin(-1).values,
        torch.cat([vh[..., :known, :], right], -2),
    )


def _by_library(w: Float[Tensor, "*b m n"]) -> Triplets:
    """LAPACK's or cuSOLVER's, of which a second one is tried."""
    try:
        return tuple(torch.linalg.svd(w, full_matrices=False))
    except torch.linalg.LinAlgError:
        if not w.is_cuda:
            raise
        return tuple(torch.linalg.svd(w, full_matrices=False, driver="gesvd"))
