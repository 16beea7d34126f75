"""WaveFT, VB-LoRA, GOFT and LoReFT: their papers written out in NumPy float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import perturb
from oracle import Array, every_shape, linear, near, output, rank_of, tensors
from test_oracles_maps import moved
from torch import nn

from svdpeft import GOFT, LoReFT, VBLoRA, WaveFT, attach
from svdpeft.methods.goft import stages

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


# -- GOFT ----------------------------------------------------------------------------------------------------


def stage_matrices(n: int, blocks: list[Array]) -> list[Array]:
    found, used, distance = [], 0, 1
    while distance < n:
        s = np.eye(n)
        for i in range(0, n, 2 * distance):
            if (k := i + distance) < n:
                s[np.ix_([i, k], [i, k])] = blocks[used]
                used += 1
        found.append(s)
        distance *= 2
    assert used == n - 1 == len(blocks)
    return found


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7), (5, 16), (3, 2)], ids=str)
@pytest.mark.parametrize("variant", ["goft", "qgoft"])
def test_goft(shape: tuple[int, int], variant: Any):
    adapter, f, w, x, found = moved(GOFT(variant), shape)
    if variant == "goft":
        turns = [math.pi * math.tanh(p) for p in f["p"]]
        blocks = [np.array([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]]) for t in turns]
    else:
        blocks = list(f["S"])
    product = np.linalg.multi_dot([np.eye(shape[1]), *stage_matrices(shape[1], blocks), np.eye(shape[1])])
    near(found, x @ (w @ product).T)
    near(adapter.delta("layer"), w @ product - w)
    assert adapter.trainable_count == (shape[1] - 1) * (1 if variant == "goft" else 4)
    orthogonal = np.abs(product @ product.T - np.eye(shape[1])).max() < 1e-12
    assert orthogonal == (variant == "goft")


def test_goft_turns_an_input_into_any_direction():
    n = 6
    model, w, _ = linear((n, n))
    adapter = attach(model, GOFT())
    target = np.random.default_rng(1).standard_normal(n)
    target /= np.linalg.norm(target)
    # From the last stage, which acts on an input first: what is not yet where it belongs waits in the lower index.
    length = {i: target[i] for i in range(n)}
    theta = np.zeros(n - 1)
    for distance, which in stages(n):
        for pair, i in zip(range(which.start, which.stop), range(0, n, 2 * distance), strict=False):
            theta[pair] = math.atan2(length[i + distance], length[i])
            length[i] = math.hypot(length[i], length[i + distance])
    with torch.no_grad():
        adapter.sites["layer"].factors.p.copy_(torch.from_numpy(np.arctanh(theta / math.pi)))
    near((w + adapter.delta("layer").numpy())[:, 0], w @ target)


def test_penalty_of_goft():
    model = nn.ModuleDict({name: nn.Linear(9, 5, dtype=torch.float64) for name in "ab"})
    adapter = attach(model, GOFT("qgoft", gamma=0.3))
    assert not adapter.penalty().any()
    perturb(adapter)
    blocks = [b for site in adapter.sites.values() for b in site.factors.S.detach().numpy()]
    near(adapter.penalty(), 0.3 * sum((b[:, 0] @ b[:, 1]) ** 2 for b in blocks))
    assert attach(model, GOFT(), name="turns").penalty() is None
    assert attach(model, GOFT("qgoft", gamma=0.0), name="free").penalty() is None
    with pytest.raises(ValueError, match="variant 'givens' is neither 'goft' nor 'qgoft'"):
        GOFT("givens")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gamma -1\.0 is negative"):
        GOFT(gamma=-1.0)
    with pytest.raises(ValueError, match="1 input: there is nothing to turn"):
        attach(nn.ModuleDict({"a": nn.Linear(1, 5)}), GOFT())


# -- LoReFT --------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("variant", ["loreft", "direft"])
def test_loreft(shape: tuple[int, int], rank: int, variant: Any):
    model, _, _ = linear(shape)
    start = tensors(attach(model, LoReFT(rank, variant)))
    if variant == "loreft":
        near(start["R"] @ start["R"].T, np.eye(rank))
        np.testing.assert_array_equal(start["W"], start["R"])
    else:
        assert np.abs(start["R"]).max() <= 1 / math.sqrt(shape[0])
        assert not start["W"].any()
    adapter, f, w, x, found = moved(LoReFT(rank, variant), shape)
    h = x @ w.T
    edited = np.array([row + f["R"].T @ (f["W"] @ row - (f["R"] @ row if variant == "loreft" else 0)) for row in h])
    near(found, edited)
    assert rank_of(adapter.delta("layer").numpy()) == adapter.sites["layer"].method.export_rank(*shape) == rank
    assert adapter.trainable_count == 2 * rank * shape[0]


def test_a_step_of_loreft_leaves_its_directions_orthonormal():
    model = nn.ModuleDict({name: nn.Linear(9, 6, dtype=torch.float64) for name in "ab"})
    adapter = attach(model, LoReFT(rank=3))
    perturb(adapter)
    before = {name: (s.factors.R.detach().numpy().copy(), s.factors.W.clone()) for name, s in adapter.sites.items()}
    adapter.after_step()
    for name, site in adapter.sites.items():
        r, w = before[name]
        u, _, vh = np.linalg.svd(r, full_matrices=False)
        near(site.factors.R, u @ vh)
        assert torch.equal(site.factors.W, w)
    free = attach(model, LoReFT(rank=3, variant="direft"), name="free")
    perturb(free)
    before_free = free.sites["a"].factors.R.clone()
    free.after_step()
    assert torch.equal(free.sites["a"].factors.R, before_free)


def test_the_bias_is_not_edited():
    layer = nn.Linear(5, 4, dtype=torch.float64)
    perturb(attach(nn.ModuleDict({"layer": layer}), LoReFT(rank=2)))
    x = torch.zeros(2, 5, dtype=torch.float64)
    assert torch.equal(layer(x), layer.bias.expand(2, -1))


def test_ranks_of_loreft_that_do_not_fit():
    with pytest.raises(ValueError, match="rank 7 is outside"):
        attach(linear((6, 9))[0], LoReFT(rank=7))
    assert attach(linear((6, 9))[0], LoReFT(rank=7), clip_rank=True).sites["layer"].method.rank == 6
    assert attach(linear((9, 6))[0], LoReFT(rank={"layer": 7})).sites["layer"].method.export_rank(9, 6) == 6
    with pytest.raises(ValueError, match="variant 'reft' is neither 'loreft' nor 'direft'"):
        LoReFT(variant="reft")  # type: ignore[arg-type]
