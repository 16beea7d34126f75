"""Clusters of rows: a small k-means that gives the same answer every time and leaves no cluster empty.

Source: S. P. Lloyd, Least squares quantization in PCM, 1982, started from rows drawn at random.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def kmeans(points: Float[Tensor, "*b m r"], clusters: int, seed: int = 0, steps: int = 10) -> Int[Tensor, "*b m"]:
    """Return the cluster of each row; clusters are numbered by their first row.

    Distances do not change when the columns are rotated or reflected, so the signs of singular vectors do not matter.

    Args:
        points: rows, (*b, m, r); computed in float64.
        clusters: at most m.
        seed: of the rows that start as centres; the global random state is neither read nor changed.
        steps: of Lloyd's algorithm; fewer where nothing moves any more.

    Returns:
        Labels in [0, clusters), (*b, m), int64; each occurs.

    Example:
        >>> kmeans(torch.tensor([[5.0], [0.0], [5.1], [0.2], [0.1]]), clusters=2)
        tensor([0, 1, 0, 1, 1])
    """
    *batch, m, r = points.shape
    if not 1 <= clusters <= m:
        raise ValueError(f"{clusters} clusters of {m} rows: between 1 and {m} are possible")
    x = points.detach().double().reshape(-1, m, r)  # (b, m, r)
    chosen = torch.randperm(m, generator=torch.Generator().manual_seed(seed))[:clusters]
    centres = x[:, chosen.to(x.device)]  # (b, k, r)
    labels = _filled(_distances(x, centres))
    for _ in range(steps):
        members = F.one_hot(labels, clusters).to(x.dtype)  # (b, m, k)
        centres = members.mT @ x / members.sum(-2).unsqueeze(-1)
        moved = _filled(_distances(x, centres))
        if torch.equal(moved, labels):
            break
        labels = moved
    first = F.one_hot(labels, clusters).argmax(-2)  # (b, k): the first row of each
    return first.argsort(-1).argsort(-1).gather(-1, labels).reshape(*batch, m)


def _distances(x: Float[Tensor, "b m r"], centres: Float[Tensor, "b k r"]) -> Float[Tensor, "b m k"]:
    """Squared distances, (b, m, k)."""
    return (x.square().sum(-1, keepdim=True) - 2 * x @ centres.mT + centres.square().sum(-1).unsqueeze(-2)).clamp(min=0)


def _filled(distances: Float[Tensor, "b m k"]) -> Int[Tensor, "b m"]:
    """The nearest centre of each row; a cluster that got none takes the farthest row of those that have company."""
    nearest = distances.min(-1)
    labels, far = nearest.indices, nearest.values
    clusters = distances.shape[-1]
    counts = F.one_hot(labels, clusters).sum(-2)  # (b, k)
    for b, cluster in (counts == 0).nonzero().tolist():
        alone = counts[b].gather(0, labels[b]) == 1
        row = far[b].masked_fill(alone, -1.0).argmax()
        counts[b, labels[b, row]] -= 1
        labels[b, row], far[b, row], counts[b, cluster] = cluster, -1.0, 1
    return labels
