"""What one spectrum says: how many directions a matrix really has, and how unequal they are.

    p_i = σ_i / Σσ                effective rank  exp(−Σ p_i log p_i)        1 … K
    stable rank  Σσ² / σ_1²       condition number  σ_1 / σ_r                energy of rank r  Σ_{i≤r} σ_i² / Σσ²

Sources: O. Roy & M. Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007; M. Rudelson &
R. Vershynin, Sampling from large matrices, 2007, arXiv:math/0503442 (the stable, or numerical, rank); Eckart & Young
1936 (no matrix of rank r keeps more energy than the leading r triplets).
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdpeft.decomposition import SVD, truncated_svd


def effective_rank(s: Tensor) -> Tensor:
    """Return exp of the entropy of σ / Σσ: the number of equal singular values that would be spread as evenly.

    Args:
        s: singular values, (*b, K), >= 0.

    Returns:
        Between 1 and K, (*b,); 0 for a matrix of zeros.

    Example:
        >>> effective_rank(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])).round(decimals=4)
        tensor([3., 1.])

    Source: Roy & Vetterli 2007.
    """
    total = s.sum(-1)
    p = s / total.clamp(min=torch.finfo(s.dtype).tiny).unsqueeze(-1)
    return torch.where(total > 0, torch.special.entr(p).sum(-1).exp(), torch.zeros_like(total))


def stable_rank(s: Tensor) -> Tensor:
    """Return ‖W‖_F² / ‖W‖_2², between 1 and K, (*b,); 0 for a matrix of zeros.

    Example:
        >>> stable_rank(torch.tensor([2.0, 2.0, 1.0]))
        tensor(2.2500)
    """
    total, top = s.square().sum(-1), s.amax(-1).square()
    return torch.where(top > 0, total / top, torch.zeros_like(top))


def condition_number(s: Tensor, rank: int | None = None) -> Tensor:
    """Return σ_1 / σ_r of the leading r triplets, (*b,); infinite where σ_r is zero, NaN for a matrix of zeros.

    Args:
        s: singular values in descending order, (*b, K).
        rank: r; ``None`` is K, the condition number of the whole matrix.

    Example:
        >>> s = torch.tensor([8.0, 2.0, 0.5])
        >>> condition_number(s), condition_number(s, rank=2)
        (tensor(16.), tensor(4.))
    """
    return s[..., 0] / s[..., s.shape[-1] - 1 if rank is None else rank - 1]


def energy(s: Tensor) -> Tensor:
    """Return the share of ‖W‖_F² that each rank r = 1 … K keeps, (*b, K); NaN for a matrix of zeros.

    Example:
        >>> energy(torch.tensor([2.0, 1.0, 0.0]))
        tensor([0.8000, 1.0000, 1.0000])
    """
    kept = s.square().cumsum(-1)
    return kept / kept[..., -1:]


def energy_rank(s: Tensor, share: float = 0.9) -> Tensor:
    """Return the smallest rank that keeps a share of ‖W‖_F², (*b,); 0 for a matrix of zeros.

    Args:
        s: singular values in descending order, (*b, K).
        share: between 0 and 1.

    Raises:
        ValueError: the share is outside (0, 1].

    Example:
        >>> energy_rank(torch.tensor([2.0, 1.0, 1.0]), share=0.8)
        tensor(2)
    """
    if not 0 < share <= 1:
        raise ValueError(f"energy {share} is outside (0, 1]: it is the share of the squared Frobenius norm to keep")
    slack = 4 * torch.finfo(s.dtype).eps  # the cumulative sum is rounded; a share of 1 must still be reached
    short = (energy(s) < share - slack).sum(-1)
    return torch.where(s.amax(-1) > 0, short + 1, torch.zeros_like(short))


def decompose(w: Tensor, where: str) -> SVD:
    """Return the whole thin SVD; a matrix of zeros, which has no singular vectors, gets the first unit vectors."""
    if w.any():
        return truncated_svd(w, None, "exact", where=where)
    *batch, m, n = w.shape
    k = min(m, n)
    eye = torch.eye(max(m, n), dtype=w.dtype, device=w.device)
    return SVD(eye[:m, :k].expand(*batch, m, k), w.new_zeros(*batch, k), eye[:k, :n].expand(*batch, k, n))
