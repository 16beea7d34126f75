"""Truncated singular value decomposition: the only place in the library where a weight is decomposed.

    w ≈ u diag(s) vh        u (*b, m, r)    s (*b, r)    vh (*b, r, n)

The exact driver computes in float64 and rounds: in float32 the vectors of close singular values depend on the solver,
and on its number of threads. Where values are equal a fixed rule chooses (``canonical``). So equal weights have equal
factors up to rounding, on every machine, and a file needs no bases that can be found again. The randomized driver, for
few triplets of a large weight, is several times faster and stops at an error of 1e-4 of each value; its vectors are
the same on every run, and on another machine up to that error.

Sources: Eckart & Young 1936 (the best rank-r approximation); ``full`` and ``krylov`` name those of the two drivers; the
sign rule is that of scikit-learn's ``svd_flip``.
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
from svdpeft.decomposition.full import full_svd
from svdpeft.decomposition.krylov import leading_triplets

Driver = Literal["auto", "exact", "randomized"]
DRIVERS = ("auto", "exact", "randomized")
LARGE, SHARE = 256, 12  # "auto" is randomized where min(m, n) >= LARGE and rank <= min(m, n) / SHARE
ALIGNED = 64  # bytes: where torch lets its own memory begin

_DEVICE: ContextVar[torch.device | None] = ContextVar("decompose_on", default=None)
_APPROXIMATED: ContextVar[list[str] | None] = ContextVar("approximated", default=None)


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


@contextmanager
def approximations() -> Iterator[list[str]]:
    """Collect the names of what the randomized driver decomposes within the block: other machines find other vectors.

    Example:
        >>> with approximations() as found:
        ...     _ = truncated_svd(torch.eye(9), 1, "randomized", where="here")
        >>> found
        ['here']
    """
    found: list[str] = []
    token = _APPROXIMATED.set(found)
    try:
        yield found
    finally:
        _APPROXIMATED.reset(token)


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
        w: matrices, shape (*b, m, n), any float dtype.
        rank: number of triplets kept, 1 <= rank <= min(m, n); ``None`` keeps all.
        driver: ``"exact"`` (float64), ``"randomized"`` (block Krylov in at least float32; values to 1e-4 of each), or
            ``"auto"``: randomized where it is cheaper, for min(m, n) >= 256 and rank <= min(m, n) / 12.
        seed: of the randomized driver's start; the global random state is neither read nor changed.
        where: name of the site, for the error messages.

    Returns:
        The triplets in at least float32, on ``w``'s device, wherever they were computed. The largest-magnitude entry of
        each column of ``u`` is positive, and where singular values coincide the vectors are chosen by a fixed rule, so
        equal weights give equal factors whatever the exact driver's solver.

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
    w = w.cpu() if w.device.type == "mps" else w  # which has no float64
    if driver == "auto":
        driver = "randomized" if min(m, n) >= LARGE and rank * SHARE <= min(m, n) else "exact"
    if driver == "randomized" and (found := _APPROXIMATED.get()) is not None:
        found.append(where)
    how = "exact-float64" if driver == "exact" else f"krylov-rank{rank}-seed{seed}"

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        # A file that is mapped into memory begins anywhere, and a product's last bits depend on where its matrices do.
        elsewhere = type(w) is Tensor and w.data_ptr() % ALIGNED  # of others, such as shapes without values, none asks
        here = w.clone() if elsewhere else w
        found = leading_triplets(here, rank, seed) if driver == "randomized" else None
        if found is None:
            found = full_svd(here.double(), where, w.dtype)
        u, s, vh = canonical(*found, TOLERANCE[w.dtype])
        return u.to(w.dtype), s.to(w.dtype), vh.to(w.dtype)

    u, s, vh = remembered(w, how, rank, compute)
    return SVD(*(_own(t).to(home) for t in (u, s, vh)))


def _own(t: Tensor) -> Tensor:
    """Without the memory of what it was cut from."""
    alone = t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes
    return t if alone else t.clone(memory_format=torch.contiguous_format)


def minor_svd(w: Tensor, rank: int, *, where: str = "the weight") -> SVD:
    """Return the ``rank`` trailing triplets of the thin SVD, the smallest singular value last; always exact.

    Example:
        >>> minor_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=1).s
        tensor([1.])
    """
    u, s, vh = truncated_svd(w, None, "exact", where=where)
    check_rank(rank, w.shape[-2], w.shape[-1], where)
    return SVD(_own(u[..., -rank:]), _own(s[..., -rank:]), _own(vh[..., -rank:, :]))


def check_matrix(w: Tensor, where: str, zero: bool = False) -> None:
    """Raise a ValueError that names ``where`` if ``w`` cannot be decomposed; ``zero`` lets a matrix of zeros pass."""
    shape = "x".join(map(str, w.shape))
    if not w.is_floating_point():
        raise ValueError(f"{where} ({shape}) has dtype {w.dtype}: only floating-point weights can be adapted")
    if w.ndim < 2 or w.numel() == 0:
        raise ValueError(f"{where} has shape ({shape}): a non-empty matrix or batch of matrices is needed")
    if w.is_meta:
        raise ValueError(f"{where} ({shape}) is on the meta device: load the weights first, e.g. with to_empty()")
    ends = torch.stack(torch.aminmax(w.detach()))  # one pass for both checks
    if not ends.isfinite().all():
        bad = int((~torch.isfinite(w)).sum())
        raise ValueError(f"{where} ({shape}) holds {bad} NaN or infinite values of {w.numel()}")
    if not zero and (ends == 0).all():
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
