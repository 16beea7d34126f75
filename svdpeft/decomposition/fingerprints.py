"""A few numbers by which a tensor that was computed again is known to be the same.

    t_k = g_kᵀ X h_k        g_k, h_k fixed, entries in [−1, 1), k = 1 … 8

The mean of (t_k − t'_k)² is ‖X − X'‖_F² / 9 on average, whatever X − X' is: no other tensor comes out the same but by a
chance that is not met in practice.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from svdpeft.decomposition.canonical import fixed_numbers

COUNT = 8
TOLERANCE = 1e-7  # of ‖X‖_F: float32 rounds in every entry to 6e-8, and solvers agree to far less than that


def products(x: Tensor) -> list[float]:
    """Return g_kᵀ X h_k of a tensor, as rows of its last axis.

    Example:
        >>> len(products(torch.eye(3)))
        8
    """
    x = (x.detach().cpu() if x.device.type == "mps" else x.detach()).double()
    x = x.reshape(-1, x.shape[-1])
    left, right = (torch.from_numpy(_vectors(size, seed)).to(x) for seed, size in enumerate(x.shape, start=3))
    return ((left.mT @ x) * right.mT).sum(-1).tolist()


@functools.lru_cache(maxsize=32)  # of the few sizes that a model has
def _vectors(size: int, seed: int) -> np.ndarray:
    """No tensor: one that is made while torch only follows shapes has no values, and would be kept for later calls."""
    return fixed_numbers(size, COUNT, seed)


def agrees(x: Tensor, expected: Sequence[float]) -> bool:
    """Whether a tensor is the one of these products, up to ``TOLERANCE``.

    Example:
        >>> agrees(torch.eye(3), products(torch.eye(3))), agrees(-torch.eye(3), products(torch.eye(3)))
        (True, False)
    """
    if len(expected) != COUNT:
        return False
    off = torch.tensor(products(x), dtype=torch.float64) - torch.tensor(expected, dtype=torch.float64)
    size = torch.linalg.vector_norm(x.detach(), dtype=x.dtype)
    return bool(3 * off.square().mean().sqrt() <= TOLERANCE * float(size))
