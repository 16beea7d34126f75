"""Singular vectors that depend on the matrix alone, and not on the solver that found them.

    a single value            (uᵢ, vᵢ) → ±(uᵢ, vᵢ): the largest entry of uᵢ is positive
    a cluster, σ equal        (U, V) → (U Q, V Q)      Q = orth(Uᵀ G)
    the kernel, σ = 0         U → orth(P G), V → orth(P' G'): P, P' project on what the other vectors leave

A solver is free to choose within each of these lines; any two choices come out the same. G are fixed numbers, orth is
the Q of a QR decomposition whose R has a positive diagonal. What is closer than ``TOLERANCE`` · σ₁ counts as equal:
what is farther apart float64 tells apart to more digits than the vectors are wanted with.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

TOLERANCE = {torch.float32: 1e-7, torch.float64: 1e-12}  # by what the vectors are wanted in
TIE = 1e-6  # entries of a vector that differ by less, relative to the largest, are equally large


def fixed_numbers(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Return numbers in [−1, 1), float64, the same to the bit on every machine and for every version of NumPy."""
    return 2 * np.random.RandomState(seed).random_sample((rows, columns)) - 1


def canonical_signs(
    u: Float[Tensor, "*b m r"], vh: Float[Tensor, "*b r n"]
) -> tuple[Float[Tensor, "*b m r"], Float[Tensor, "*b r n"]]:
    """Flip pairs of singular vectors so that the largest-magnitude entry of each column of ``u`` is positive.

    Of several that are equally large up to rounding it is the first.

    Example:
        >>> canonical_signs(torch.tensor([[-1.0], [0.0]]), torch.tensor([[0.0, 2.0]]))
        (tensor([[1.],
                [-0.]]), tensor([[-0., -2.]]))
    """
    size = u.abs()
    largest = size >= (1 - TIE) * size.amax(-2, keepdim=True)
    peak = u.gather(-2, largest.to(torch.uint8).argmax(-2, keepdim=True))  # (*b, 1, r)
    sign = torch.where(peak < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, vh * sign.mT


def canonical(
    u: Float[Tensor, "*b m r"], s: Float[Tensor, "*b r"], vh: Float[Tensor, "*b r n"], tolerance: float
) -> tuple[Float[Tensor, "*b m r"], Float[Tensor, "*b r"], Float[Tensor, "*b r n"]]:
    """Return the triplets with those of their bases that do not depend on the solver.

    Args:
        u: left vectors, (*b, m, r), float64.
        s: values, (*b, r), descending.
        vh: right vectors, (*b, r, n).
        tolerance: values that are closer, relative to the largest, are equal.

    Example:
        >>> turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
        >>> u, s, vh = canonical(turn, torch.ones(3, dtype=torch.float64), turn.mT, 1e-12)
        >>> other = canonical(torch.eye(3, dtype=torch.float64), s, torch.eye(3, dtype=torch.float64), 1e-12)
        >>> torch.allclose(u, other[0])
        True
    """
    u, vh = canonical_signs(u, vh)
    near = tolerance * s[..., :1]
    if bool((s[..., :-1] - s[..., 1:] <= near).any() | (s[..., -1:] <= near).any()):
        u, vh = u.clone(), vh.clone()
        values = s.reshape(-1, s.shape[-1]).tolist()
        lefts, rights = u.reshape(-1, *u.shape[-2:]), vh.reshape(-1, *vh.shape[-2:])
        for b, row in enumerate(values):
            _settle(lefts[b], row, rights[b], tolerance)
        u, vh = lefts.reshape(u.shape), rights.reshape(vh.shape)
    return u, s, vh


def _settle(u: Float[Tensor, "m r"], s: list[float], vh: Float[Tensor, "r n"], tolerance: float) -> None:
    """Turn the vectors of one matrix in place."""
    near = tolerance * s[0]
    known = sum(value > near for value in s)  # below, left and right vectors know nothing of each other
    ends = [i for i in range(1, known) if s[i - 1] - s[i] > near]
    for start, end in zip([0, *ends], [*ends, known], strict=True):
        if end - start > 1:
            cluster = u[:, start:end]
            turn = _orthonormal(cluster.mT @ torch.from_numpy(fixed_numbers(len(u), end - start)).to(u))
            u[:, start:end] = cluster @ turn
            vh[start:end] = turn.mT @ vh[start:end]
    if known < len(s):
        _kernel(u, known, seed=1)
        _kernel(vh.mT, known, seed=2)


def _kernel(q: Float[Tensor, "m r"], known: int, seed: int) -> None:
    """Put fixed vectors, as far as they are orthogonal to the first ``known`` columns, in the place of the others."""
    first = q[:, :known]
    rest = torch.from_numpy(fixed_numbers(len(q), q.shape[-1] - known, seed)).to(q)
    for _ in range(2):  # what rounding has left of the first after one projection
        rest = _orthonormal(rest - first @ (first.mT @ rest))
    q[:, known:] = rest


def _orthonormal(q: Float[Tensor, "m r"]) -> Float[Tensor, "m r"]:
    q, r = torch.linalg.qr(q)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)
