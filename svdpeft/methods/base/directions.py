"""Directions that data have chosen, and what is done where they chose none: a solver's rounding is no direction."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from svdpeft.decomposition import SVD, Driver, fixed_numbers, truncated_svd
from svdpeft.methods.base.given import Given


def leading(x: Float[Tensor, "*b m n"], given: Given, method: str, driver: Driver, *, least: int, most: int) -> SVD:
    """Return the triplets of a gradient, or of what is made of one, that are above rounding.

    Args:
        x: the matrices.
        given: the site.
        method: that asks, for the message.
        driver: of the decomposition.
        least: how many there must be.
        most: how many are wanted.

    Raises:
        ValueError: there are fewer than ``least``.
    """
    *_, m, n = x.shape
    found = truncated_svd(x, min(most, m, n), driver, seed=given.seed, where=f"the gradient of {given.name}")
    rounding = int((found.s <= max(m, n) * torch.finfo(x.dtype).eps * found.s[..., :1]).sum(-1).amax())
    known = found.s.shape[-1] - rounding
    if known < least:
        raise ValueError(
            f"the gradient of {given.name} ({m}x{n}) has {known} singular values above rounding, and {method} of rank "
            f"{least} starts from at least {least}: calibrate with more examples, or take a rank of at most "
            f"{max(known, 1)} there"
        )
    return SVD(found.u[..., :known], found.s[..., :known], found.vh[..., :known, :])


def trailing(moment: Float[Tensor, "*b n n"], rank: int, reached: int) -> Float[Tensor, "*b n r"]:
    """Return eigenvectors of the smallest eigenvalues; of a kernel that is larger the same for every solver.

    Args:
        moment: Σ x xᵀ, float64.
        rank: r.
        reached: how many dimensions the x can have at most: the others are the kernel.
    """
    n = moment.shape[-1]
    vectors = torch.linalg.eigh(moment).eigenvectors[..., : max(n - reached, rank)]  # the smallest first
    if vectors.shape[-1] == rank:
        return vectors
    fixed = torch.from_numpy(fixed_numbers(n, rank)).to(vectors)
    return torch.linalg.qr(vectors @ (vectors.mT @ fixed)).Q
