"""HiRA, (IA)³, HRA, RoAd, FourierFT, SHiRA, C3A and ETHER+: their papers written out in NumPy float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import perturb
from oracle import Array, every_shape, linear, near, output, rank_of, tensors
from torch import nn

from svdpeft import C3A, HRA, IA3, ETHERPlus, FourierFT, HiRA, RoAd, SHiRA, attach
from svdpeft.adapter.adapter import Adapter


def moved(
    method: Any, shape: tuple[int, int], size: float = 0.3
) -> tuple[Adapter, dict[str, Array], Array, Array, Any]:
    """An adapter off its start: it, its tensors, W0, the inputs and what the layer gives for them."""
    model, w, x = linear(shape)
    before = output(model, x)
    adapter = attach(model, method, clip_rank=True)
    if method.exact_start:
        np.testing.assert_array_equal(output(model, x), before)
        assert not adapter.delta("layer").any()
    perturb(adapter, size)
    assert adapter.trainable_count == adapter.sites["layer"].method.count(1, *shape)
    return adapter, tensors(adapter), w, x, output(model, x)


def unit(u: Array) -> Array:
    return u / np.linalg.norm(u, axis=0)


# -- HiRA and (IA)³ ------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_hira(shape: tuple[int, int], rank: int):
    model, w, x = linear(shape)
    adapter = attach(model, HiRA(rank=rank))
    f = tensors(adapter)
    assert not f["L"].any()
    assert 0.5 / math.sqrt(shape[1]) < np.abs(f["A"]).max() <= 1 / math.sqrt(shape[1])
    perturb(adapter)
    f = tensors(adapter)
    new = w * (1 + f["L"] @ f["A"])
    near(output(model, x), x @ new.T)
    near(adapter.delta("layer"), new - w)
    assert adapter.trainable_count == rank * sum(shape)
    with pytest.raises(ValueError, match="rank 0 is below 1"):
        HiRA(rank=0)
    with pytest.raises(ValueError, match=r"rank 32 is outside \[1, "):
        attach(linear(shape)[0], HiRA())


@every_shape
def test_ia3(shape: tuple[int, int]):
    adapter, f, w, x, found = moved(IA3(), shape)
    near(found, f["l"] * (x @ w.T))
    near(adapter.delta("layer"), np.diag(f["l"]) @ w - w)
    adapter, f, w, x, found = moved(IA3(side="input"), shape)
    near(found, (f["l"] * x) @ w.T)
    near(adapter.delta("layer"), w @ np.diag(f["l"]) - w)
    with pytest.raises(ValueError, match="side 'rows' is neither"):
        IA3(side="rows")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [IA3(), RoAd()], ids=str)
def test_the_bias_of_the_layer_stays(method: IA3 | RoAd):
    layer = nn.Linear(5, 4, dtype=torch.float64)
    model, x = nn.ModuleDict({"layer": layer}), torch.zeros(2, 5, dtype=torch.float64)
    perturb(attach(model, method))
    assert torch.equal(layer(x), layer.bias.expand(2, -1))


# -- HRA -----------------------------------------------------------------------------------------------------


def reflections(u: Array) -> Array:
    h = np.eye(len(u))
    for column in unit(u).T:
        h = h @ (np.eye(len(u)) - 2 * np.outer(column, column))
    return h


@every_shape
@pytest.mark.parametrize("rank", [2, 4, 6])
def test_hra(shape: tuple[int, int], rank: int):
    model, w, _ = linear(shape)
    u = tensors(attach(model, HRA(rank=rank)))["U"]
    np.testing.assert_array_equal(u[:, 0::2], u[:, 1::2])
    near(reflections(u), np.eye(shape[1]))
    assert 0.5 / math.sqrt(rank / 2) < np.abs(u).max() <= 1 / math.sqrt(rank / 2)
    adapter, f, w, x, found = moved(HRA(rank=rank), shape)
    h = reflections(f["U"])
    near(found, x @ (w @ h).T)
    near(adapter.delta("layer"), w @ h - w)
    near(np.linalg.svd(w + adapter.delta("layer").numpy(), compute_uv=False), np.linalg.svd(w, compute_uv=False))
    assert rank_of(adapter.delta("layer").numpy()) == adapter.sites["layer"].method.export_rank(*shape)
    assert adapter.trainable_count == rank * shape[1]


@pytest.mark.parametrize("method", [HRA(rank=4), ETHERPlus(2)], ids=str)
def test_a_small_turn_keeps_its_digits(method: HRA | ETHERPlus):
    """In float32 the change is good to a share of its own size, and not of the weight's, 1e4 times as large."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(40, 30)})
    adapter = attach(model, method)
    perturb(adapter, size=1e-4)
    found = adapter.delta("layer").double()
    adapter.sites["layer"].factors.double()
    model.double()
    exact = adapter.delta("layer")
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-5


def test_penalty_of_hra():
    model = nn.ModuleDict({name: nn.Linear(9, 5, dtype=torch.float64) for name in "ab"})
    adapter = attach(model, HRA(rank=4, gamma=0.3))
    perturb(adapter)
    expected = 0.0
    for site in adapter.sites.values():
        u = unit(site.factors.U.detach().numpy())
        expected += 0.3 * np.linalg.norm(np.eye(4) - u.T @ u)
    penalty = adapter.penalty()
    assert penalty is not None
    near(penalty, expected)
    assert attach(nn.ModuleDict({"a": nn.Linear(9, 5)}), HRA(rank=4)).penalty() is None


def test_ranks_of_hra_that_do_not_fit():
    for rank, near_by in ((3, 2), (1, 2), (0, 2), (7, 6)):
        with pytest.raises(ValueError, match=rf"rank {rank}: reflections come in pairs.*; {near_by} would do"):
            HRA(rank=rank)
    with pytest.raises(ValueError, match="rank 5: reflections"):
        HRA(rank={"a": 2, ".*": 5})
    with pytest.raises(ValueError, match=r"rank 8 is outside \[2, 6\] at layer \(6x7\)"):
        attach(linear((6, 7))[0], HRA())
    assert attach(linear((6, 7))[0], HRA(), clip_rank=True).sites["layer"].method.rank == 6
    with pytest.raises(ValueError, match="1 input: there is nothing to reflect"):
        attach(linear((6, 1))[0], HRA(), clip_rank=True)
    with pytest.raises(ValueError, match=r"gamma -1\.0 is negative"):
        HRA(gamma=-1.0)


# -- RoAd ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7), (1, 3)])
@pytest.mark.parametrize("variant", [1, 2, 4])
def test_road(shape: tuple[int, int], variant: Any):
    adapter, f, w, x, found = moved(RoAd(variant), shape)
    r = np.zeros((shape[0] + shape[0] % 2,) * 2)
    for i, (a, t) in enumerate(zip(f["alpha"], f["theta"], strict=True)):
        # cos of the first row, of the second, sin of the first, of the second
        which = {1: [0, 0, 0, 0], 2: [0, 1, 0, 1], 4: [0, 1, 2, 3]}[variant]
        c1, c2 = (a[k] * np.cos(t[k]) for k in which[:2])
        s1, s2 = (a[k] * np.sin(t[k]) for k in which[2:])
        r[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[c1, -s1], [s2, c2]]
    r = r[: shape[0], : shape[0]]
    near(found, x @ (r @ w).T)
    near(adapter.delta("layer"), r @ w - w)
    assert adapter.trainable_count == variant * len(f["alpha"]) * 2
    with pytest.raises(ValueError, match="variant 3 is not one of 1, 2, 4"):
        RoAd(3)  # type: ignore[arg-type]


# -- FourierFT -----------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("frequencies", [1, 8])
@pytest.mark.parametrize("reference", [False, True])
def test_fourierft(shape: tuple[int, int], frequencies: int, reference: bool):
    m, n = shape
    adapter, f, w, x, found = moved(FourierFT(frequencies, alpha=40.0, reference_init=reference), shape)
    delta = np.zeros(shape)
    j, k = np.arange(m)[:, None], np.arange(n)[None]
    assert len(set(f["index"])) == frequencies
    for c, at in zip(f["c"], f["index"], strict=True):
        p, q = divmod(int(at), n)
        delta += 40.0 * c * np.cos(2 * np.pi * (j * p / m + k * q / n)) / (m * n)
    near(found, x @ (w + delta).T)
    near(adapter.delta("layer"), delta)
    assert adapter.trainable_count == frequencies
    assert rank_of(delta) <= 2 * frequencies


def test_entries_of_fourierft_are_those_of_a_shape():
    sizes = {"a": (6, 9), "b": (9, 6), "c": (6, 9)}
    model = nn.ModuleDict({name: nn.Linear(n, m) for name, (m, n) in sizes.items()})
    a, b, c = (site.factors.index for site in attach(model, FourierFT(5)).sites.values())
    assert a is c
    assert not torch.equal(a, b)
    again = attach(model, FourierFT(5), name="again", seed=1).sites["a"].factors.index
    assert not torch.equal(a, again)
    drawn = attach(nn.ModuleDict({"layer": nn.Linear(90, 60)}), FourierFT(2000, reference_init=True))
    c = tensors(drawn)["c"]
    assert abs(c.mean()) < 0.1
    assert abs(c.std() - 1) < 0.1
    with pytest.raises(ValueError, match=r"frequencies 1000 is more than the 54 entries of a \(6x9\)"):
        attach(model, FourierFT(), name="more")
    assert attach(model, FourierFT(), name="less", clip_rank=True).sites["a"].method.frequencies == 54
    with pytest.raises(ValueError, match="frequencies 0 is below 1"):
        FourierFT(0)


# -- SHiRA ---------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("rank", [1, 3])
def test_shira(shape: tuple[int, int], rank: int):
    m, n = shape
    adapter, f, w, x, found = moved(SHiRA(rank=rank), shape)
    assert len(set(f["index"])) == len(f["index"]) == rank * (m + n)
    delta = np.zeros(m * n)
    delta[f["index"]] = f["values"]
    near(found, x @ (w + delta.reshape(m, n)).T)
    near(adapter.delta("layer"), delta.reshape(m, n))
    assert adapter.trainable_count == rank * (m + n)


def test_masks_of_shira():
    model = nn.ModuleDict({name: nn.Linear(20, 30) for name in "ab"})
    a, b = (site.factors.index for site in attach(model, SHiRA(rank=2)).sites.values())
    assert not torch.equal(a, b)
    assert a.unique(return_counts=True)[1].max() == 1
    assert torch.equal(a, attach(model, SHiRA(rank=2), name="again").sites["a"].factors.index)
    assert not torch.equal(a, attach(model, SHiRA(rank=2), name="other", seed=1).sites["a"].factors.index)
    with pytest.raises(ValueError, match=r"rank 13 at a \(30x20\) is 650 of 600 entries: at most 12"):
        attach(model, SHiRA(rank=13), name="more")
    assert attach(model, SHiRA(rank=13), name="less", clip_rank=True).sites["a"].method.rank == 12
    row = attach(nn.ModuleDict({"a": nn.Linear(5, 1)}), SHiRA(rank=1), clip_rank=True)
    assert row.trainable_count == 5  # all there are
    with pytest.raises(ValueError, match="rank 0 is below 1"):
        SHiRA(rank=0)


# -- C3A -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "b"), [(6, 9, 3), (9, 6, 3), (8, 12, 4), (8, 12, 2), (7, 7, 7), (6, 9, 1)])
@pytest.mark.parametrize("reference", [False, True])
def test_c3a(m: int, n: int, b: int, reference: bool):
    model, _, _ = linear((m, n))
    bound = np.abs(tensors(attach(model, C3A(b, reference_init=reference)))["w"]).max()
    assert (0.5 * math.sqrt(6 / (m + n)) < bound <= math.sqrt(6 / (m + n))) if reference else bound == 0
    adapter, f, w, x, found = moved(C3A(b, reference_init=reference), (m, n))
    delta = np.zeros((m, n))
    for i in range(m // b):
        for j in range(n // b):
            for row in range(b):
                for column in range(b):
                    delta[i * b + row, j * b + column] = f["w"][i, j, (column - row) % b] / n
    near(found, x @ (w + delta).T)
    near(adapter.delta("layer"), delta)
    assert adapter.trainable_count == m * n // b


def test_block_sizes_of_c3a_that_do_not_fit():
    with pytest.raises(ValueError, match=r"block_size 4 does not divide both sides of layer \(12x18\): 3 and 6 would"):
        attach(linear((12, 18))[0], C3A(4))
    assert attach(linear((12, 18))[0], C3A(), clip_rank=True).sites["layer"].method.block_size == 6
    with pytest.raises(ValueError, match="block_size 0 is below 1"):
        C3A(0)


# -- ETHER+ --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "blocks"), [(6, 9, 1), (9, 6, 3), (7, 7, 1), (30, 20, 2)])
def test_ether_plus(m: int, n: int, blocks: int):
    model, _, _ = linear((m, n))
    f = tensors(attach(model, ETHERPlus(blocks)))
    for side, size in (("in", n), ("out", m)):
        u = f[f"u_{side}"]
        assert u.shape == (blocks, size // blocks)
        np.testing.assert_array_equal(f[f"v_{side}"], -u)
        assert 0.4 / math.sqrt(size / blocks) < np.abs(u).max() <= 1 / math.sqrt(size / blocks)
    adapter, f, w, x, found = moved(ETHERPlus(blocks), (m, n))
    sides = {}
    for side, size in (("in", n), ("out", m)):
        h, b = np.eye(size), size // blocks
        for i in range(blocks):
            u, v = unit(f[f"u_{side}"][i]), unit(f[f"v_{side}"][i])
            h[i * b : i * b + b, i * b : i * b + b] += np.outer(v, v) - np.outer(u, u)
        assert np.linalg.norm(h - np.eye(size)) <= 2 * math.sqrt(blocks)
        sides[side] = h
    new = sides["out"] @ w @ sides["in"]
    near(found, x @ new.T)
    near(adapter.delta("layer"), new - w)
    assert adapter.trainable_count == 2 * (m + n)
    assert rank_of(new - w) == adapter.sites["layer"].method.export_rank(m, n) == min(4 * blocks, m, n)


def test_blocks_of_ether_plus_that_do_not_fit():
    with pytest.raises(ValueError, match=r"blocks 4 does not divide both sides of layer \(12x18\): 3 and 6 would"):
        attach(linear((12, 18))[0], ETHERPlus(4))
    assert attach(linear((12, 18))[0], ETHERPlus(4), clip_rank=True).sites["layer"].method.blocks == 3
    with pytest.raises(ValueError, match="blocks 0 is below 1"):
        ETHERPlus(0)
