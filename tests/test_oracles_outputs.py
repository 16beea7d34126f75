"""WaveFT, VB-LoRA and LoReFT: their papers written out in NumPy float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracle import Array, near
from test_oracles_maps import moved
from torch import nn

from svdpeft import WaveFT, attach

# -- WaveFT --------------------------------------------------------------------------------------------------


def haar(size: int) -> Array:
    """One level of Haar's synthesis, (size, size): averages first, then differences."""
    t = np.zeros((size, size))
    for i in range(size // 2):
        t[2 * i : 2 * i + 2, i] = 1 / math.sqrt(2)
        t[2 * i : 2 * i + 2, size // 2 + i] = 1 / math.sqrt(2), -1 / math.sqrt(2)
    return t


@pytest.mark.parametrize("shape", [(6, 8), (6, 9), (9, 6), (7, 7), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("frequencies", [1, 4, 1000])
def test_waveft(shape: tuple[int, int], frequencies: int):
    m, n = shape
    adapter, f, w, x, found = moved(WaveFT(frequencies, alpha=3.0), shape)
    count = min(frequencies, m * n)
    assert len(set(f["index"])) == len(f["index"]) == count == adapter.trainable_count
    tall, wide = m + m % 2, n + n % 2
    s = np.zeros((tall, wide))
    for c, at in zip(f["c"], f["index"], strict=True):
        s[divmod(int(at), n)] = c
    # In the published layout the quarter above on the right has differences of rows, and that below on the left those
    # of columns: each is where the plain transform has the other.
    swapped = s.copy()
    swapped[: tall // 2, wide // 2 :], swapped[tall // 2 :, : wide // 2] = 0, 0
    delta = haar(tall) @ swapped @ haar(wide).T
    for i in range(tall // 2):
        for j in range(wide // 2):
            patch = np.s_[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            delta[patch] += s[i, wide // 2 + j] * np.array([[1, 1], [-1, -1]]) / 2
            delta[patch] += s[tall // 2 + i, j] * np.array([[1, -1], [1, -1]]) / 2
    delta = 3.0 * delta[:m, :n]
    near(found, x @ (w + delta).T)
    near(adapter.delta("layer"), delta)
    if count == m * n and tall == m and wide == n:
        near(np.linalg.norm(delta), 3.0 * np.linalg.norm(f["c"]))  # an orthonormal transform


def test_entries_of_waveft_are_those_of_a_shape():
    model = nn.ModuleDict({name: nn.Linear(n, m) for name, (m, n) in {"a": (6, 9), "b": (9, 6), "c": (6, 9)}.items()})
    a, b, c = (site.factors.index for site in attach(model, WaveFT(5)).sites.values())
    assert a is c
    assert not torch.equal(a, b)
    assert not torch.equal(a, attach(model, WaveFT(5), name="again", seed=1).sites["a"].factors.index)
    with pytest.raises(ValueError, match=r"frequencies 2592 is more than the 54 entries of a \(6x9\)"):
        attach(model, WaveFT(), name="more")
    with pytest.raises(ValueError, match="frequencies 0 is below 1"):
        WaveFT(0)
