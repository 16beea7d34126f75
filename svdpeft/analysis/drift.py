"""How far the singular triplets of a weight have moved: ΔΣ and ΔD, and what entered among the leading ones.

    ΔΣ = (1/K) Σ_i |σ'_i − σ_i|        ΔD = 1 − ½ (1/K) Σ_i ( |⟨u_i, u'_i⟩| + |⟨v_i, v'_i⟩| )

W = Σ σ_i u_i v_iᵀ is the base, W' = Σ σ'_i u'_i v'_iᵀ the whole weight later on, K = min(m, n). Matched by index, as in
the SORSA paper, ΔD jumps when two singular values cross: the same two vectors change places. Matched by assignment,
i → π(i) of the largest Σ_i |⟨u_i, u'_π(i)⟩| · |⟨v_i, v'_π(i)⟩|, it does not. Vectors of equal singular values are not
determined; by assignment, the bases that W and W' leave open are chosen as near to each other as they can be.

Sources: Y. Cao & Z. Song, SORSA, arXiv:2409.00055, and its analysis notebook; R. Shuttleworth et al., LoRA vs Full
Fine-tuning: An Illusion of Equivalence, 2024, arXiv:2410.21228 (intruder dimensions); E. Hu et al., LoRA,
arXiv:2106.09685, section 7 (subspace overlap, amplification).
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from svdpeft.decomposition import SVD, truncated_svd, uncached
from svdpeft.decomposition.orthonormality import polar

SURE = 0.67  # > 2/3: see assign
DEGENERATE = 10  # times eps σ_1: singular values nearer than that are equal, as far as an SVD can tell
TRACE = 1e-3


class Drift(NamedTuple):
    """ΔΣ and ΔD of each matrix, (*b,), matched by index and by assignment."""

    delta_sigma: Tensor
    delta_d: Tensor
    delta_sigma_assigned: Tensor
    delta_d_assigned: Tensor


def drift(start: SVD, now: SVD) -> Drift:
    """Return ΔΣ and ΔD between two whole thin SVDs.

    Args:
        start: of the base, ``u`` (*b, m, K), ``s`` (*b, K), ``vh`` (*b, K, n).
        now: of the weight later on, in the same shapes.

    Returns:
        ΔΣ in the unit of the weights, ΔD between 0 and 1.

    Example:
        >>> w = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> swapped = torch.diag(torch.tensor([2.0, 3.0, 1.0]))  # no vector moves, two singular values cross
        >>> d = drift(truncated_svd(w), truncated_svd(swapped))
        >>> [round(float(x), 4) for x in d]
        [0.0, 0.6667, 0.6667, 0.0]
    """
    by_index = _mean_cosines(start, now)
    near = _aligned(start, now)
    far = _aligned(now, near)
    left, right = (near.u.mT @ far.u).abs(), (near.vh @ far.vh.mT).abs()  # (*b, K, K)
    order = assign(left * right)
    at = order.unsqueeze(-1)
    assigned = (left.gather(-1, at) + right.gather(-1, at)).squeeze(-1).mean(-1) / 2
    return Drift(
        (now.s - start.s).abs().mean(-1),
        (1 - by_index).clamp(min=0),
        (now.s.gather(-1, order) - start.s).abs().mean(-1),
        (1 - assigned).clamp(min=0),
    )


def assign(overlap: Tensor) -> Tensor:
    """Return the one-to-one assignment of the largest total overlap.

    Args:
        overlap: |⟨u_i, u'_j⟩| · |⟨v_i, v'_j⟩| of orthonormal bases, (*b, K, K).

    Returns:
        The column of each row, (*b, K).

    Rows and columns sum to at most one (Cauchy–Schwarz). So a pair above 2/3 is in a best assignment: to part with it
    gains less than 2 · 1/3. Only what is left goes to ``scipy.optimize.linear_sum_assignment``.
    """
    peak, order = overlap.max(-1)
    sure = peak > SURE
    for i in (~sure).any(-1).nonzero().tolist():
        from scipy.optimize import linear_sum_assignment

        matrix, known = overlap[tuple(i)], sure[tuple(i)]
        rows, columns = (~known).nonzero().squeeze(-1), torch.ones_like(known)
        columns[order[tuple(i)][known]] = False
        left = columns.nonzero().squeeze(-1)
        _, best = linear_sum_assignment(matrix[rows][:, left].double().cpu().numpy(), maximize=True)
        order[(*i, rows)] = left[torch.from_numpy(best).to(left.device)]
    return order


def subspace_drift(start: SVD, now: SVD, rank: int) -> Tensor:
    """Return 1 − ½ (‖U_rᵀU'_r‖_F² + ‖V_rᵀV'_r‖_F²) / r: what has left the leading subspaces, (*b,).

    Blind to whatever happens within them, near-degenerate vectors that turn into each other included.

    Example:
        >>> w = truncated_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
        >>> subspace_drift(w, truncated_svd(torch.diag(torch.tensor([2.0, 3.0, 1.0]))), rank=2)
        tensor(0.)
    """
    left = start.u[..., :rank].mT @ now.u[..., :rank]
    right = start.vh[..., :rank, :] @ now.vh[..., :rank, :].mT
    return (1 - (left.square().sum((-2, -1)) + right.square().sum((-2, -1))) / (2 * rank)).clamp(min=0)


def intruders(start: SVD, now: SVD, k: int = 10, epsilon: float = 0.5) -> Tensor:
    """Return the number of intruder dimensions, (*b,): leading left vectors of W' that are unlike all of W's.

        #{ j ≤ k : max_i |⟨u_i, u'_j⟩| < ε }

    Args:
        start: of the base, all K triplets.
        now: of the weight later on.
        k: how many leading vectors of W' are looked at.
        epsilon: cosine below which two vectors are unlike.

    Example:
        >>> w = torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.5]))
        >>> lora = 5 * torch.ones(4, 1) @ torch.ones(1, 4) / 4
        >>> intruders(truncated_svd(w), truncated_svd(w + 9 * lora), epsilon=0.6)
        tensor(1)

    Source: Shuttleworth et al. 2024, arXiv:2410.21228; its k = 10 and a threshold of 0.5.
    """
    cosine = (start.u.mT @ now.u[..., :k]).abs().amax(-2)  # (*b, k)
    return (cosine < epsilon).sum(-1)


class Overlap(NamedTuple):
    """How the update lies to the weight, (*b,); NaN for an update of zeros."""

    left: Tensor
    right: Tensor
    amplification: Tensor


def update_overlap(start: SVD, change: Tensor, rank: int) -> Overlap:
    """Return how much of the update's leading directions the weight's leading ones hold.

        left  ‖U_k(W)ᵀ U_k(ΔW)‖_F² / k        amplification  ‖ΔW‖_F / ‖U_k(ΔW)ᵀ W V_k(ΔW)‖_F

    An overlap of 1: the update stays in the leading subspace. Two random k-dimensional subspaces of R^m have k / m. A
    large amplification: the update grows directions that are weak in W.

    Args:
        start: of the base, all K triplets.
        change: ΔW, (*b, m, n).
        rank: k; lowered to the rank of ΔW where that is smaller.

    Example:
        >>> w = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
        >>> up = torch.diag(torch.tensor([0.0, 0.0, 3.0]))  # along the weakest direction
        >>> [float(x) for x in update_overlap(truncated_svd(w), up, rank=1)]
        [0.0, 0.0, 3.0]

    Source: Hu et al. 2021, arXiv:2106.09685, sections 7.2 and 7.3.
    """
    if not change.any():
        nan = torch.full_like(start.s[..., 0], torch.nan)
        return Overlap(nan, nan, nan)
    with uncached():
        u, s, vh = truncated_svd(change, rank, "randomized")
    noise = max(change.shape[-2:]) * torch.finfo(s.dtype).eps * s[..., :1]
    kept = (s > noise).to(s.dtype)  # (*b, k), a prefix: beyond the rank of ΔW vectors mean nothing
    k = kept.sum(-1)
    left = start.u.mT @ (u * kept.unsqueeze(-2))  # (*b, K, k)
    right = start.vh @ (vh * kept.unsqueeze(-1)).mT
    inside = (left * start.s.unsqueeze(-1)).mT @ right  # U_k(ΔW)ᵀ W V_k(ΔW)
    u_same, v_same = ((g[..., :rank, :] * kept.unsqueeze(-1)).square().sum((-2, -1)) / k for g in (left, right))
    size = torch.linalg.matrix_norm(change)
    grown = torch.where(k > 0, size / torch.linalg.matrix_norm(inside), torch.nan)
    return Overlap(u_same, v_same, grown)


def _mean_cosines(start: SVD, now: SVD) -> Tensor:
    left, right = (start.u * now.u).sum(-2).abs(), (start.vh * now.vh).sum(-1).abs()  # (*b, K)
    return (left + right).mean(-1) / 2


def _aligned(start: SVD, now: SVD) -> SVD:
    """Of all SVDs of the first matrix, one that is near to that of the second: what equal values leave open."""
    noise = DEGENERATE * torch.finfo(start.s.dtype).eps * start.s[..., :1]
    equal = start.s[..., :-1] - start.s[..., 1:] <= noise  # (*b, K − 1)
    open_ = equal.any(-1) | (start.s[..., -1:] <= noise).any(-1)
    if not open_.any():
        return start
    u, v = start.u.clone(), start.vh.mT.clone()
    for i in map(tuple, open_.nonzero().tolist()):
        edges = [0, *((~equal[i]).nonzero().squeeze(-1) + 1).tolist(), start.s.shape[-1]]
        for a, b in pairwise(edges):
            zero = bool(start.s[(*i, a)] <= noise[i])
            if b - a > 1 or zero:
                u[(*i, slice(None), slice(a, b))], v[(*i, slice(None), slice(a, b))] = _turned(
                    u[i], v[i], now.u[i], now.vh[i].mT, slice(a, b), zero
                )
    return SVD(u, start.s, v.mT)


def _turned(u: Tensor, v: Tensor, u1: Tensor, v1: Tensor, part: slice, zero: bool) -> tuple[Tensor, Tensor]:
    """The vectors of one cluster of equal singular values, turned towards those that they went to.

    Both bases turn together, but where the value is zero: there each is anything that is orthogonal to the rest.
    """
    if zero:
        halves = ((u, u1), (v, v1))
        left, right = (b1 - b[:, : part.start] @ (b[:, : part.start].mT @ b1) for b, b1 in halves)
    else:
        left, right = u[:, part].mT @ u1, v[:, part].mT @ v1
    size = part.stop - part.start
    reached = (left.norm(dim=0) * right.norm(dim=0)).topk(size).indices
    if zero:  # a trace of the old vectors, which are orthogonal to the rest too: what was reached may not be a basis
        return polar(left[:, reached] + TRACE * u[:, part]), polar(right[:, reached] + TRACE * v[:, part])
    turn = polar(left[:, reached] + right[:, reached])  # u and v of a pair change sign together: no cancelling
    return u[:, part] @ turn, v[:, part] @ turn
