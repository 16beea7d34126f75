"""Structured cores: the C of L C A, kept as the few numbers it has.

    diagonal   values (*b, r)       C = diag(values)
    sparse     values (*b, K)       C[i, j] = values[k] where index[k] = i·r + j, zero elsewhere
    dense      values (*b, r, r)

A core is used as an operator on r channels: a vector (*b, r) scales them, a matrix (*b, r, r) mixes them.
Patterns follow SVFT (arXiv:2405.19597): all but the plain one have the size of a band, K(d) = r(2d+1) − d(d+1).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def scatter_core(
    values: Float[Tensor, "*b k"], index: Int[Tensor, "*b k"] | Int[Tensor, " k"], rank: int
) -> Float[Tensor, "*b {rank} {rank}"]:
    """Write the entries of a sparse core into a dense matrix; coordinates that occur twice add up.

    Args:
        values: the entries, (*b, K).
        index: their row-major positions in [0, r²), (*b, K) or (K,), int64.
        rank: r.

    Returns:
        The core, (*b, r, r), differentiable in ``values``.

    Example:
        >>> scatter_core(torch.tensor([5.0, 7.0]), torch.tensor([1, 2]), rank=2)
        tensor([[0., 5.],
                [7., 0.]])
    """
    flat = values.new_zeros(*values.shape[:-1], rank * rank)
    return flat.scatter_add(-1, index.expand_as(values), values).unflatten(-1, (rank, rank))


def band_count(rank: int, off_diagonals: int) -> int:
    """Number of entries of an r×r band with ``off_diagonals`` diagonals on each side: K(d) = r(2d+1) − d(d+1).

    Example:
        >>> band_count(768, 4)
        6892
    """
    d = min(off_diagonals, rank - 1)  # a wider band is the whole matrix
    return rank * (2 * d + 1) - d * (d + 1)


def band_index(rank: int, off_diagonals: int) -> Int[Tensor, " k"]:
    """Positions with |i − j| <= ``off_diagonals``, ascending, (K,).

    Example:
        >>> band_index(3, 0)
        tensor([0, 4, 8])
    """
    offsets = range(max(-off_diagonals, 1 - rank), min(off_diagonals, rank - 1) + 1)  # j − i
    diagonals = [torch.arange(max(0, -k), rank - max(0, k)) * (rank + 1) + k for k in offsets]
    return torch.cat(diagonals).sort().values


def random_index(rank: int, count: int, generator: torch.Generator) -> Int[Tensor, " count"]:
    """``count`` different positions drawn from a seeded generator, ascending, (count,)."""
    return torch.randperm(rank * rank, generator=generator)[:count].sort().values


def top_index(score: Float[Tensor, "*b p q"], count: int) -> Int[Tensor, "*b {count}"]:
    """Positions of the ``count`` largest scores of each matrix, ascending, (*b, count).

    Example:
        >>> top_index(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), 2)
        tensor([1, 2])
    """
    return score.flatten(-2).topk(count, dim=-1).indices.sort(-1).values
