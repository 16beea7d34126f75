"""Truncated singular value decomposition: the only place in the library where a weight is decomposed.

    w ≈ u diag(s) vh        u (*b, m, r)    s (*b, r)    vh (*b, r, n)

It is computed in float64 and rounded: in float32 the vectors of close singular values depend on the solver, and on its
number of threads. Where values are equal a fixed rule chooses (``canonical``). So equal weights have equal factors up
to rounding, on every machine, and a file needs no bases that can be found again.

Sources: Eckart & Young 1936 (the best rank-r approximation); Halko, Martinsson & Tropp 2011, arXiv:0909.4061
(the randomized driver); the sign rule is that of scikit-learn's ``svd_flip``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from svdpeft.decomposition.cache import remembered
from svdpeft.decomposition.canonical import TOLERANCE, canonical

Driver = Literal["auto", "exact", "randomized"]
DRIVERS = ("auto", "exact", "randomized")
OVERSAMPLING = 16  # extra columns of the sketch
POWER_ITERATIONS = 8  # each multiplies the spectral gap by a square; 8 leaves ~1e-3 relative error on flat spectra


_DEVICE: ContextVar[torch.device | None] = ContextVar("decompose_on", default=None)


@contextmanager
def decomposing_on(device: str | torch.device | None) -> Iterator[None]:
    """Within the block every matrix is decomposed on another device than its own, and the triplets come back.

    Args:
        device: such as ``"cuda"``; one matrix at a time is there. ``None``: that of each matrix.

    Raises:
        ValueError: there is no such device here, or it holds no values.
    """
    try:
        found = None if device is None else torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # what torch says differs by kind
        raise ValueError(f"decompose_on={device!r} is no device here: {str(error).splitlines()[0]}") from error
    if found is not None and found.type == "meta":
        raise ValueError(f"decompose_on={device!r}: nothing can be computed there")
    token = _DEVICE.set(found)
    try:
        yield
    finally:
        _DEVICE.reset(token)


class SVD(NamedTuple):
    """Singular triplets: ``u`` (*b, m, r), ``s`` (*b, r) descending and >= 0, ``vh`` (*b, r, n)."""

    u: Float[Tensor, "*b m r"]
    s: Float[Tensor, "*b r"]
    vh: Float[Tensor, "*b r n"]

    def balanced(self) -> tuple[Float[Tensor, "*b m r"], Float[Tensor, "*b r n"]]:
        """Return U √Σ (*b, m, r) and √Σ Vᵀ (*b, r, n): two factors of equal size whose product is U Σ Vᵀ."""
        root = self.s.sqrt()
        return self.u * root.unsqueeze(-2), root.unsqueeze(-1) * self.vh


def truncated_svd(
    w: Tensor,  # refused in words by check_matrix
    rank: int | None = None,
    driver: Driver = "auto",
    *,
    seed: int = 0,
    where: str = "the weight",
) -> SVD:
    """Return the ``rank`` leading singular triplets of each matrix in ``w``.

    Args:
        w: matrices, shape (*b, m, n), any float dtype; computed in float64.
        rank: number of triplets kept, 1 <= rank <= min(m, n); ``None`` keeps all.
        driver: ``"exact"`` (LAPACK or cuSOLVER), ``"randomized"`` (range finder with power iterations), or
            ``"auto"``: randomized where it is much cheaper, for min(m, n) >= 1024 and rank <= min(m, n) / 8.
        seed: of the randomized driver's sketch; the global random state is neither read nor changed.
        where: name of the site, for the error messages.

    Returns:
        The triplets in at least float32, on ``w``'s device, wherever they were computed. The largest-magnitude entry of
        each column of ``u`` is positive, and where singular values coincide the vectors are chosen by a fixed rule, so
        equal weights give equal factors whatever the solver.

    Raises:
        ValueError: ``w`` is empty, not floating point, all zero, or holds a NaN or an infinity; ``rank`` or
            ``driver`` is out of range.

    Example:
        >>> u, s, vh = truncated_svd(torch.tensor([[3.0, 0.0, 0.0], [0.0, -2.0, 0.0]]), rank=1)
        >>> u.shape, s, vh.shape
        (torch.Size([2, 1]), tensor([3.]), torch.Size([1, 3]))
    """
    check_matrix(w, where)
    *_, m, n = w.shape
    rank = check_rank(min(m, n) if rank is None else rank, m, n, where)
    if driver not in DRIVERS:
        raise ValueError(f"driver {driver!r} is not one of {', '.join(DRIVERS)}")
    home = w.device
    w = w.detach().to(_DEVICE.get() or home, torch.promote_types(w.dtype, torch.float32))
    if driver == "auto":
        driver = "randomized" if min(m, n) >= 1024 and rank * 8 <= min(m, n) else "exact"
    how = "exact-float64" if driver == "exact" else f"rank{rank}-seed{seed}-float64"

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        wide = w.cpu().double() if w.device.type == "mps" else w.double()  # which has no float64
        found = _exact(wide, where) if driver == "exact" else _randomized(wide, rank, seed, where)
        u, s, vh = canonical(*found, TOLERANCE[w.dtype])
        count = rank if driver == "randomized" else s.shape[-1]
        return u[..., :count].to(w), s[..., :count].to(w), vh[..., :count, :].to(w)

    u, s, vh = remembered(w, how, rank, compute)
    return SVD(u.contiguous().to(home), s.clone().to(home), vh.contiguous().to(home))  # no view that keeps s alive


def minor_svd(w: Tensor, rank: int, *, where: str = "the weight") -> SVD:
    """Return the ``rank`` trailing triplets of the thin SVD, the smallest singular value last; always exact.

    Example:
        >>> minor_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=1).s
        tensor([1.])
    """
    u, s, vh = truncated_svd(w, None, "exact", where=where)
    check_rank(rank, w.shape[-2], w.shape[-1], where)
    return SVD(u[..., -rank:].contiguous(), s[..., -rank:].clone(), vh[..., -rank:, :].contiguous())


def check_matrix(w: Tensor, where: str, zero: bool = False) -> None:
    """Raise a ValueError that names ``where`` if ``w`` cannot be decomposed; ``zero`` lets a matrix of zeros pass."""
    shape = "x".join(map(str, w.shape))
    if not w.is_floating_point():
        raise ValueError(f"{where} ({shape}) has dtype {w.dtype}: only floating-point weights can be adapted")
    if w.ndim < 2 or w.numel() == 0:
        raise ValueError(f"{where} has shape ({shape}): a non-empty matrix or batch of matrices is needed")
    if w.is_meta:
        raise ValueError(f"{where} ({shape}) is on the meta device: load the weights first, e.g. with to_empty()")
    peak = w.detach().abs().amax()  # one pass and one synchronisation for all three checks
    if not torch.isfinite(peak):
        bad = int((~torch.isfinite(w)).sum())
        raise ValueError(f"{where} ({shape}) holds {bad} NaN or infinite values of {w.numel()}")
    if peak == 0 and not zero:
        raise ValueError(
            f"{where} ({shape}) is all zero, so it has no singular vectors, and nothing to turn or to scale: exclude "
            "it, or use a method that does not start from the weight, such as LoRA"
        )


def check_rank(rank: int, m: int, n: int, where: str, limit: float | None = None) -> int:
    """Return ``rank`` if 1 <= rank <= min(m, n), or another limit, else raise a ValueError that names ``where``."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ValueError(f"rank {rank!r} at {where} is not a whole number")
    limit = min(m, n) if limit is None else limit
    if not 1 <= rank <= limit:
        raise ValueError(f"rank {rank} is outside [1, {limit}] at {where} ({m}x{n}); clip_rank=True lowers it there")
    return rank


def _exact(w: Float[Tensor, "*b m n"], where: str) -> SVD:
    """Full thin SVD in float64; where the solver does not converge, by another, then through the Gram matrix."""
    for driver in (None, "gesvd") if w.is_cuda else (None,):
        try:
            return SVD(*torch.linalg.svd(w, full_matrices=False, driver=driver))
        except torch.linalg.LinAlgError:
            pass
    return _gram(w, where)


def _gram(w: Float[Tensor, "*b m n"], where: str) -> SVD:
    """SVD by the eigenvectors of the smaller Gram matrix: slower to lose digits than to fail.

    Small singular values are known to sqrt(eps) of the largest only; QR makes both bases orthonormal again.
    """
    *_, m, n = w.shape
    if m > n:
        vh, s, u = _gram(w.mT, where)
        return SVD(u.mT, s, vh.mT)
    try:
        _, basis = torch.linalg.eigh(w @ w.mT)
    except torch.linalg.LinAlgError as error:
        shape = "x".join(map(str, w.shape))
        raise ValueError(f"no driver could decompose {where} ({shape}), largest entry {w.abs().max():.3g}") from error
    u = basis.flip(-1)  # (*b, m, m), by descending eigenvalue
    q, upper = torch.linalg.qr((u.mT @ w).mT)  # (*b, n, m), (*b, m, m): the rows of uᵀw are orthogonal already
    diagonal = upper.diagonal(dim1=-2, dim2=-1)  # (*b, m)
    flip = torch.where(diagonal < 0, -1.0, 1.0).to(w.dtype)
    s, order = (diagonal * flip).sort(dim=-1, descending=True)
    u = u.gather(-1, order.unsqueeze(-2).expand_as(u))
    v = (q * flip.unsqueeze(-2)).gather(-1, order.unsqueeze(-2).expand_as(q))
    return SVD(u, s, v.mT)


def _randomized(w: Float[Tensor, "*b m n"], rank: int, seed: int, where: str) -> SVD:
    """Project on a random range, sharpened by power iterations, and decompose the small matrix exactly."""
    *_, m, n = w.shape
    width = min(rank + OVERSAMPLING, m, n)
    # Drawn on the CPU, so that a seed means the same sketch on every device.
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(n, width, generator=generator, dtype=torch.float32).to(w)  # (n, p)
    q = torch.linalg.qr(w @ sketch).Q  # (*b, m, p)
    for _ in range(POWER_ITERATIONS):
        q = torch.linalg.qr(w @ torch.linalg.qr(w.mT @ q).Q).Q
    small = _exact(q.mT @ w, where)  # (*b, p, n)
    return SVD(q @ small.u, small.s, small.vh)
