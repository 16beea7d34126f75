"""The leading singular triplets of a large matrix by a randomised block Krylov method.

    Ω random (n, b)      K = [AΩ, A²Ω, …, AᵗΩ],  A = WᵀW      V = orth(K)      Vᵀ A V = Q Λ Qᵀ
    σᵢ ≈ √λᵢ             vᵢ ≈ V qᵢ                             uᵢ ≈ W vᵢ / σᵢ

Every block of K is used, not the last power alone: on the flat spectra of trained weights the error falls with √gap
per block instead of gap. Blocks are few columns wide and are added until the values are near enough. That is told from
how they moved: the moves of a Krylov method shrink by a ratio ρ, so what is left is move · ρ / (1 − ρ). V is kept as
rows, to which a block is added in place. A maps each block to the span of the next, so that VᵀAV is block tridiagonal:
what takes out of A x the last two blocks is what VᵀAV has more by it, and the others are there by rounding alone.

Sources: Musco & Musco 2015, arXiv:1504.05477; Tropp & Webber 2023, arXiv:2306.12418 (section 4 on the width of blocks).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from svdpeft.decomposition.full import by_gram

ACCURACY = 1e-4  # relative error of each of the values at which no further block is added
BLOCK = 16  # columns; wider for high ranks, where a few wide products cost less than many narrow ones
DIGITS = 1e3  # a λ below this many ε of the largest keeps too few of its digits
ORTHONORMAL = 1e-4  # the largest entry of VᵀV − I
LARGEST = 0.6  # of min(m, n): a basis of more columns saves nothing over the full decomposition


def leading_triplets(
    w: Float[Tensor, "*b m n"], rank: int, seed: int
) -> tuple[Float[Tensor, "*b m r"], Float[Tensor, "*b r"], Float[Tensor, "*b r n"]] | None:
    """Return the ``rank`` leading triplets, in float64, or ``None`` where another way is better.

    That is: the basis becomes so large that they are no cheaper, or the last of them are so small that their squares
    drown in the rounding of the largest one's.

    Args:
        w: matrices, (*b, m, n), float32 or float64.
        rank: r, at most min(m, n).
        seed: of Ω, which is drawn on the CPU: a seed means the same on every device.

    Example:
        >>> w = torch.diag(1 / torch.arange(1.0, 201.0))
        >>> u, s, vh = leading_triplets(w, rank=2, seed=0)
        >>> s.float()
        tensor([1.0000, 0.5000])
    """
    *batch, m, n = w.shape
    if m < n:  # V lies on the shorter side
        found = leading_triplets(w.mT, rank, seed)
        return None if found is None else (found[2].mT, found[1], found[0].mT)
    block = max(BLOCK, rank // 4)
    if 2 * max(rank, block) > LARGEST * n:
        return None
    blocks = int(LARGEST * n) // block
    start = torch.randn(n, block, generator=torch.Generator().manual_seed(seed)).to(w)
    x = _orthonormal(_normal(w, start.mT.expand(*batch, block, n)))  # the newest rows of Vᵀ, (*b, b, n)
    vt = w.new_empty(*batch, blocks * block, n)
    small = w.new_zeros(*batch, blocks * block, blocks * block)  # VᵀAV, its lower triangle
    last, move = None, None
    for count in range(1, blocks + 1):
        new, size = slice((count - 1) * block, count * block), count * block
        vt[..., new, :] = x
        begin = max(size - 2 * block, 0)
        known, recent = vt[..., :size, :], vt[..., begin:size, :]
        ax = _normal(w, x)
        along = ax @ recent.mT  # (*b, b, 2b)
        small[..., new, begin:size] = along
        if size >= 2 * rank:
            values = torch.linalg.eigvalsh(small[..., :size, :size])[..., -rank:]
            if bool((values[..., :1] < DIGITS * torch.finfo(w.dtype).eps * values[..., -1:]).any()):
                return None
            if last is not None:
                before, move = move, _largest_move(last, values)
                if before is not None and float(ACCURACY / _left(before, move)) >= 1:
                    return _found(w, known, small[..., :size, :size], rank)
            last = values
        x = _orthonormal(ax - along @ recent)
        x = _orthonormal(x - (x @ known.mT) @ known)  # what rounding has left of the others
    return None


def _largest_move(before: Float[Tensor, "*b r"], now: Float[Tensor, "*b r"]) -> Float[Tensor, ""]:
    """By how much the singular values have moved, relative to each; λ = σ² are given."""
    return ((now - before) / now.clamp(min=torch.finfo(now.dtype).tiny)).amax().clamp(min=0) / 2


def _left(before: Float[Tensor, ""], move: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """By how much they will move yet, if the moves go on shrinking so; twice that, since the ratio is an estimate."""
    ratio = (move / before).nan_to_num(0.0).clamp(max=0.99)
    return 2 * move * ratio / (1 - ratio)


def _found(
    w: Float[Tensor, "*b m n"], vt: Float[Tensor, "*b k n"], small: Float[Tensor, "*b k k"], rank: int
) -> tuple[Float[Tensor, "*b m r"], Float[Tensor, "*b r"], Float[Tensor, "*b r n"]] | None:
    """The triplets from a basis and VᵀAV, unless the basis, of a weight of very low rank, is not orthonormal."""
    if float((vt @ vt.mT - torch.eye(vt.shape[-2]).to(vt)).abs().amax()) > ORTHONORMAL:
        return None
    vt = torch.linalg.eigh(small)[1][..., -rank:].mT @ vt  # (*b, r, n)
    u, s, turn = by_gram((w @ vt.mT).double())  # its columns are orthogonal but for rounding
    return u, s, turn @ vt.double()


def _normal(w: Float[Tensor, "*b m n"], x: Float[Tensor, "*b k n"]) -> Float[Tensor, "*b k n"]:
    """A of each row of x."""
    return x @ w.mT @ w


def _orthonormal(x: Float[Tensor, "*b k n"]) -> Float[Tensor, "*b k n"]:
    """Rows that are orthonormal and span those of x."""
    return torch.linalg.qr(x.mT).Q.mT
