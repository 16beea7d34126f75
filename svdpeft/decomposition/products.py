"""Factor algebra: an update kept as a product of thin factors.

Δ = scale · L C A          L (*b, m, r)    C none, (*b, r), (*b, r, r) or a band of it    A (*b, r, n)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from svdpeft.decomposition.bands import Band


class Product(NamedTuple):
    """The product ``scale · L C A``; ``C`` is ``None`` (identity), a diagonal (*b, r), a matrix (*b, r, r) or a band.

    Example:
        >>> p = Product(torch.ones(3, 1), torch.tensor([2.0]), torch.ones(1, 2), scale=0.5)
        >>> p.dense().shape, p.dense().max(), p.rank
        (torch.Size([3, 2]), tensor(1.), 1)
    """

    L: Float[Tensor, "*b m r"]
    C: Float[Tensor, "*b r"] | Float[Tensor, "*b r r"] | Band | None
    A: Float[Tensor, "*b r n"]
    scale: float = 1.0

    @classmethod
    def of(cls, matrix: Float[Tensor, "*b m n"]) -> Product:
        """A matrix as a product with the identity, which ``truncated`` decomposes.

        Example:
            >>> Product.of(torch.ones(3, 2)).rank
            2
        """
        m, n = matrix.shape[-2:]
        eye = torch.eye(min(m, n), dtype=matrix.dtype, device=matrix.device).expand(*matrix.shape[:-2], -1, -1)
        return cls(matrix, None, eye) if n <= m else cls(eye, None, matrix)

    @property
    def rank(self) -> int:
        """The number of columns of ``L``: no update written like this has a larger rank."""
        return self.L.shape[-1]

    def cored(self) -> Float[Tensor, "*b m r"]:
        """Return L C, (*b, m, r): the scale is left out."""
        if self.C is None:
            return self.L
        if isinstance(self.C, Band):
            return self.C.after(self.L)
        return self.L * self.C.unsqueeze(-2) if self.C.ndim < self.L.ndim else self.L @ self.C

    def dense(self) -> Float[Tensor, "*b m n"]:
        """Return the whole matrix, (*b, m, n)."""
        left = self.cored()
        return (left if self.scale == 1 else left * self.scale) @ self.A  # scaled while it is thin

    @property
    def tensor_core(self) -> Float[Tensor, "*b r"] | Float[Tensor, "*b r r"] | None:
        """C as a tensor, for who takes no band."""
        return self.C.matrix() if isinstance(self.C, Band) else self.C

    def plain(self) -> Product:
        """Return the same product with a core that is a tensor."""
        return self._replace(C=self.tensor_core) if isinstance(self.C, Band) else self

    def absolute(self) -> Float[Tensor, "*b m n"]:
        """Return the dense product of the factors' absolute values: what rounding of the product is relative to."""
        core = None if self.C is None else self.C.abs()
        return Product(self.L.abs(), core, self.A.abs(), abs(self.scale)).dense()

    def to(self, dtype: torch.dtype) -> Product:
        """Return the same product with factors of another dtype."""
        return Product(self.L.to(dtype), None if self.C is None else self.C.to(dtype), self.A.to(dtype), self.scale)


def difference(now: Product, start: Product) -> Product:
    """Return ``now − start`` as one product, of as low a rank as the shared factors allow.

    A factor that did not train is the same tensor in both and is shared, so the rank stays r; where both sides
    trained it is 2r::

        L C A − L₀C₀A₀ = [LC − L₀C₀ | L₀C₀] [A ; A − A₀]

    Every bracket that holds a difference is exactly zero at the start and small after it. The start is therefore
    the base model bit for bit in every dtype, and in low precision the rounding is relative to the update rather
    than to the weight's principal part, as it would be for ``[LC | −L₀C₀] [A ; A₀]``.
    """
    assert now.scale == start.scale, "both products belong to one site"
    now, start = now.plain(), start.plain()
    if now.A is start.A and now.L is start.L and isinstance(now.C, Tensor) and isinstance(start.C, Tensor):
        a, b = now.C, start.C  # a difference of cores: r×r and not m×r
        if a.ndim != b.ndim:
            a, b = (torch.diag_embed(c) if c.ndim < now.L.ndim else c for c in (a, b))
        return Product(now.L, a - b, now.A, now.scale)
    if now.A is start.A:
        return Product(now.cored() - start.cored(), None, now.A, now.scale)
    left = start.cored()
    if now.L is start.L and now.C is start.C:
        return Product(left, None, now.A - start.A, now.scale)
    return Product(torch.cat([now.cored() - left, left], -1), None, torch.cat([now.A, now.A - start.A], -2), now.scale)


def recompress(product: Product, tolerance: float | None = None) -> Product:
    """Return an equal product in the balanced form U√Σ · √ΣVᵀ, by QR of the thin factors: m×n is never built.

    Args:
        product: any product; computed in float64.
        tolerance: singular values at or below ``tolerance · σ_max`` are dropped (a pure number); default
            max(m, n) · eps of the factors' own dtype, the rank rule of ``numpy.linalg.matrix_rank``.

    Returns:
        A product with ``C`` ``None`` and ``scale`` 1 whose rank is the exact rank of the update (the largest one in
        the batch, and at least 1), in the dtype of ``product``.
    """
    return truncated(product, None, tolerance)[0]


EXACT = (
    1e-11  # of the largest singular value: below it is the rounding of float64, in which thin factors are decomposed
)


def truncated(product: Product, rank: int | None, tolerance: float | None = None) -> tuple[Product, float]:
    """Return the nearest product of a rank, as ``recompress`` does, and what it lacks.

    Args:
        product: any product; computed in float64.
        rank: at most so much; ``None`` is the exact rank.
        tolerance: as in ``recompress``.

    Returns:
        The product and its relative distance ‖ΔW − ΔW_r‖_F / ‖ΔW‖_F, over the whole batch.

    Example:
        >>> p = Product(torch.eye(3, 2), torch.tensor([3.0, 4.0]), torch.eye(2, 3))
        >>> nearest, lost = truncated(p, 1)
        >>> nearest.rank, round(lost, 3)
        (1, 0.6)
    """
    dtype = product.L.dtype
    q, s, k = _thin_svd(product)
    exact = max(int((s > _cutoff(s, product, tolerance)).sum(-1).max()), 1)
    rank = exact if rank is None else min(rank, exact)
    root = s[..., :rank].sqrt()
    nearest = Product(
        (q[..., :rank] * root.unsqueeze(-2)).to(dtype), None, (k[..., :rank, :] * root.unsqueeze(-1)).to(dtype)
    )
    energy = s.detach().square()
    whole, lost = float(energy.sum()), float(energy[..., rank:].sum())
    return nearest, math.sqrt(lost / whole) if whole else 0.0


def exact_rank(product: Product, tolerance: float | None = None) -> Int[Tensor, "*b"]:
    """Return the numerical rank of each matrix of the update, (*b,), without building it.

    Args:
        product: any product.
        tolerance: as in ``recompress``.
    """
    s = _thin_svd(product)[1]
    return (s > _cutoff(s, product, tolerance)).sum(-1)


def _thin_svd(product: Product) -> tuple[Float[Tensor, "*b m r"], Float[Tensor, "*b r"], Float[Tensor, "*b r n"]]:
    """SVD of ``scale · L C A`` through QR of L C and of Aᵀ: O((m + n) r²)."""
    p = product.to(torch.float64)
    left, right = torch.linalg.qr(p.cored() * p.scale), torch.linalg.qr(p.A.mT)
    u, s, vh = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    return left.Q @ u, s, vh @ right.Q.mT


def _cutoff(s: Float[Tensor, "*b r"], product: Product, tolerance: float | None) -> Float[Tensor, "*b 1"]:
    if tolerance is None:
        tolerance = max(product.L.shape[-2], product.A.shape[-1]) * torch.finfo(product.L.dtype).eps
    return tolerance * s.amax(-1, keepdim=True)
