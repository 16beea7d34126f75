"""What the oracles share: NumPy float64, and nothing of the library on the right-hand side."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import perturb
from numpy.typing import NDArray
from torch import Tensor, nn

from svdpeft import attach
from svdpeft.adapter.adapter import Adapter
from svdpeft.methods.base import Factored

Array = NDArray[np.float64]
SHAPES = [(6, 9), (9, 6), (7, 7)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def near(found: Any, expected: Any) -> None:
    found = found.detach().numpy() if isinstance(found, Tensor) else found
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def rank_of(update: Array) -> int:
    """Singular values above rounding, which NumPy's own bound is not, with every BLAS, for a difference of weights."""
    return int(np.linalg.matrix_rank(update, tol=1e-10))


def linear(shape: tuple[int, int], seed: int = 0) -> tuple[nn.ModuleDict, Array, Array]:
    torch.manual_seed(seed)
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64)
    model = nn.ModuleDict({"layer": layer})
    x = np.random.default_rng(seed).standard_normal((4, shape[1]))
    return model, layer._parameters["weight"].detach().numpy().copy(), x


def triplets(w: Array, r: int | None = None) -> tuple[Array, Array, Array]:
    """Thin SVD with the largest entry of each left vector made positive."""
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    for i in range(len(s)):
        if u[np.abs(u[:, i]).argmax(), i] < 0:
            u[:, i], vh[i] = -u[:, i], -vh[i]
    return u[:, :r], s[:r], vh[:r]


def tensors(adapter: Adapter) -> dict[str, Array]:
    return {k: t.numpy().copy() for k, t in adapter.sites["layer"].factors.tensors().items()}


def output(model: nn.ModuleDict, x: Array) -> Array:
    return model["layer"](torch.from_numpy(x)).detach().numpy()


def check(
    method: Factored, shape: tuple[int, int], weight: Any, count: int, size: float = 0.3, **options: Any
) -> tuple[Adapter, dict[str, Array], Array]:
    """Attach, count, move off the start, and compare every way to compute a layer with its weight written out.

    Args:
        weight: (factors by name, W0) -> W'.
        options: of ``attach``.
    """
    model, w, x = linear(shape)
    adapter = attach(model, method, **options)
    start = tensors(adapter)
    assert adapter.trainable_count == count
    near(output(model, x), x @ weight(start, w).T)
    if method.exact_start:
        assert bool((adapter.delta("layer") == 0).all())
    perturb(adapter, size)
    f = tensors(adapter)
    expected = weight(f, w)
    assert np.abs(expected - w).max() > 1e-2
    near(output(model, x), x @ expected.T)
    near(adapter.delta("layer"), expected - w)
    adapter.fold()
    near(output(model, x), x @ expected.T)
    adapter.unfold()
    adapter.merge()
    near(model["layer"]._parameters["weight"], expected)
    adapter.unmerge()
    return adapter, start, w
