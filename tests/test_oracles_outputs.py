"""WaveFT, VB-LoRA and LoReFT: their papers written out in NumPy float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import perturb
from oracle import Array, linear, near, output, rank_of, tensors
from test_oracles_maps import moved
from torch import nn

from svdpeft import VBLoRA, WaveFT, attach

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


# -- VB-LoRA -------------------------------------------------------------------------------------------------


def pieces(bank: Array, logits: Array, k: int) -> Array:
    """Rows of mixtures, piece by piece: (r, size)."""
    rows = []
    for row in logits:
        made = []
        for z in row:
            best = np.argsort(-z)[:k]
            weight = np.exp(z[best] - z[best].max())
            made.append((weight / weight.sum()) @ bank[best])
        rows.append(np.concatenate(made))
    return np.array(rows)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (12, 12)], ids=str)
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_vblora(shape: tuple[int, int], reference: bool, k: int):
    method = VBLoRA(rank=3, vectors=5, vector_length=3, top_k=k, reference_init=reference)
    model, w, x = linear(shape)
    before = output(model, x)
    adapter = attach(model, method)
    start = tensors(adapter)
    assert np.abs(start["bank"]).max() <= 0.02
    assert start["left"].shape == (3, shape[0] // 3, 5)
    assert start["right"].shape == (3, shape[1] // 3, 5)
    first = pieces(start["bank"], start["left"], k).T @ pieces(start["bank"], start["right"], k)
    near(output(model, x), x @ (w + (first if reference else 0)).T)
    if not reference:
        np.testing.assert_array_equal(output(model, x), before)
        assert not adapter.delta("layer").any()
    perturb(adapter)
    f = tensors(adapter)
    now = pieces(f["bank"], f["left"], k).T @ pieces(f["bank"], f["right"], k)
    delta = now - (0 if reference else first)
    near(adapter.delta("layer"), delta)
    near(output(model, x), x @ (w + delta).T)
    assert rank_of(delta) <= adapter.sites["layer"].method.export_rank(*shape) == min(6 - 3 * reference, *shape)
    assert adapter.trainable_count == 5 * 3 + 5 * 3 * sum(shape) // 3


def test_one_bank_is_for_all_layers_of_a_length():
    sizes = {"a": (6, 9), "b": (9, 6), "c": (6, 4)}
    model = nn.ModuleDict({name: nn.Linear(n, m) for name, (m, n) in sizes.items()})
    adapter = attach(model, VBLoRA(rank=2, vectors=7, vector_length=3), clip_rank=True)
    a, b, c = (site.factors for site in adapter.sites.values())
    assert a.bank is b.bank
    assert a.bank0 is b.bank0
    assert c.bank.shape == (7, 2)
    assert not torch.equal(a.left, b.right)
    assert adapter.trainable_count == 7 * 3 + 7 * 2 + 2 * 7 * (2 * (6 + 9) // 3 + (6 + 4) // 2)
    assert abs(torch.cat([a.left.flatten(), b.left.flatten()]).std().item() - 0.1) < 0.03
    with pytest.raises(ValueError, match=r"vector_length 3 does not divide both sides of c \(6x4\): 2 would"):
        attach(model, VBLoRA(rank=2, vectors=7, vector_length=3), name="more")
    for options, told in (
        ({"vectors": 0}, "vectors 0 is below 1"),
        ({"vector_length": 0}, "vector_length 0 is below 1"),
        ({"top_k": 0}, "top_k 0 is below 1"),
        ({"vectors": 3, "top_k": 4}, "top_k 4 is more than the 3 vectors of the bank"),
    ):
        with pytest.raises(ValueError, match=told):
            VBLoRA(**options)


def test_a_gradient_reaches_the_bank_from_every_layer():
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)).double()
    adapter = attach(model, VBLoRA(rank=2, vectors=5, vector_length=3))
    perturb(adapter)
    f = adapter.sites["0"].factors
    model(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
    for p in (f.bank, f.left, f.right):
        assert p.grad is not None
        assert p.grad.any()
    chosen = f.left.topk(2, dim=-1).indices
    others = torch.ones_like(f.left).scatter(-1, chosen, 0.0)
    assert not (f.left.grad * others).any(), "a logit that is not among the largest k has none"
