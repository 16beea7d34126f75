"""Methods whose sites share tensors, and the clustered and joint ones: their papers in NumPy float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import perturb
from oracle import Array, every_shape, linear, near, output, rank_of, tensors, triplets
from torch import nn

from svdpeft import AdaMSS, FRoD, PiCa, RandLoRA, TinyLoRA, VeRA, attach
from svdpeft.adapter.adapter import Adapter
from svdpeft.decomposition import kmeans

SIZES = {"a": (6, 9), "b": (9, 6), "c": (7, 7), "d": (4, 11)}


def several(sizes: dict[str, tuple[int, int]] = SIZES) -> tuple[nn.ModuleDict, dict[str, Array]]:
    """Layers of several shapes in one model, and their weights."""
    torch.manual_seed(2)
    layers = {name: nn.Linear(n, m, bias=False, dtype=torch.float64) for name, (m, n) in sizes.items()}
    return nn.ModuleDict(layers), {name: layer.weight.detach().numpy().copy() for name, layer in layers.items()}


def at(adapter: Adapter, name: str) -> dict[str, Array]:
    return {k: t.numpy().copy() for k, t in adapter.sites[name].factors.tensors().items()}


# -- VeRA ----------------------------------------------------------------------------------------------------


def test_vera_start():
    adapter = attach(several()[0], VeRA(rank=5))
    for name, (m, n) in SIZES.items():
        f = at(adapter, name)
        assert f.keys() == {"b", "d", "A", "B"}
        assert f["b"].shape == (m,)
        assert f["d"].shape == (5,)
        assert (f["b"] == 0).all()
        assert (f["d"] == 0.1).all()
        assert f["A"].shape == (5, max(n for _, n in SIZES.values()))
        assert f["B"].shape == (max(m for m, _ in SIZES.values()), 5)
        assert adapter.sites[name].count == m + 5
    assert at(attach(several()[0], VeRA(rank=2, d_initial=0.7)), "a")["d"] == pytest.approx(0.7)


def test_vera_bases_are_uniform_with_the_bound_of_kaiming():
    f = at(attach(nn.ModuleDict({"layer": nn.Linear(300, 400)}), VeRA(rank=50)), "layer")
    for base, fan in ((f["A"], 300), (f["B"], 50)):
        base = base.ravel() / math.sqrt(6 / fan)
        assert base.min() < -0.999
        assert base.max() > 0.999
        assert np.abs(base).max() <= 1
        np.testing.assert_allclose(np.histogram(base, bins=10, range=(-1, 1))[0], len(base) / 10, rtol=0.1)
    assert abs(np.corrcoef(f["A"][:, :50].ravel(), f["B"][:50].ravel())[0, 1]) < 0.1  # two draws, not one


@pytest.mark.parametrize("rank", [3, 20])
def test_vera_forward(rank: int):
    model, w = several()
    adapter = attach(model, VeRA(rank=rank))
    perturb(adapter)
    for name, (m, n) in SIZES.items():
        f = at(adapter, name)
        x = np.random.default_rng(1).standard_normal((3, n))
        update = np.diag(f["b"]) @ f["B"][:m] @ np.diag(f["d"]) @ f["A"][:, :n]
        near(model[name](torch.from_numpy(x)), x @ (w[name] + update).T)
    assert adapter.trainable_count == sum(m + rank for m, _ in SIZES.values())


def test_vera_has_vectors_per_group_of_a_convolution():
    layer = nn.Conv1d(4, 6, 3, groups=2, dtype=torch.float64)
    adapter = attach(nn.ModuleDict({"layer": layer}), VeRA(rank=5), "all")
    perturb(adapter)
    f = tensors(adapter)
    assert f["b"].shape == (2, 3)
    assert f["d"].shape == (2, 5)
    delta = np.stack([np.diag(f["b"][g]) @ f["B"] @ np.diag(f["d"][g]) @ f["A"] for g in (0, 1)])
    near(adapter.delta("layer"), delta.reshape(6, 2, 3))


# -- RandLoRA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 3, 7, 10])
@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("gamma", ["shape", "peft"])
def test_randlora(rank: int, alpha: float | None, gamma: str):
    model, w = several()
    adapter = attach(model, RandLoRA(rank=rank, alpha=alpha, gamma=gamma))
    scale = 1.0 if alpha is None else alpha / rank
    for name, (m, n) in SIZES.items():
        f, k = at(adapter, name), min(m, n)
        bases = -(-k // rank)
        assert f["Lambda"].shape == (bases, rank)
        assert f["Gamma"].shape == (bases, k)
        assert (f["Lambda"] == 0).all()
        near(f["Gamma"], np.full((bases, k), 1 / (max(m, n) if gamma == "shape" else k)))
        assert adapter.sites[name].count == bases * (rank + k)
    perturb(adapter)
    for name, (m, n) in SIZES.items():
        f, k = at(adapter, name), min(m, n)
        x = np.random.default_rng(1).standard_normal((3, n))
        update = np.zeros((max(m, n), k))
        for i in range(-(-k // rank)):
            b = f["B"][: max(m, n), i]
            update += b @ np.diag(f["Lambda"][i]) @ f["A"][:, :k] @ np.diag(f["Gamma"][i])
        near(model[name](torch.from_numpy(x)), x @ (w[name] + scale * (update if m >= n else update.T)).T)
        assert rank_of(update) == k, "full rank is the point of it"


@pytest.mark.parametrize(("bases", "zeros"), [("dense", 0.0), ("sparse", 2 / 3), ("very-sparse", 1 - 1 / 20)])
def test_randlora_bases_have_unit_variance(bases: str, zeros: float):
    f = at(attach(nn.ModuleDict({"layer": nn.Linear(400, 500)}), RandLoRA(rank=100, bases=bases)), "layer")
    assert f["A"].shape == (100, 400)
    assert f["B"].shape == (500, 4, 100)
    for base in (f["A"], f["B"]):
        assert abs(base.mean()) < 0.03
        assert abs(base.std() - 1) < 0.03
        assert abs((base == 0).mean() - zeros) < 0.02
        if bases == "dense":
            np.testing.assert_allclose(
                np.histogram(base, 10, (-math.sqrt(3), math.sqrt(3)))[0], base.size / 10, rtol=0.1
            )
        else:
            assert len(np.unique(base)) == 3
    assert not np.array_equal(f["B"][:, 0], f["B"][:, 1])


def test_randlora_default_is_that_of_the_code():
    assert RandLoRA().scale == 20


# -- PiCa ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_pica(tied: bool, alpha: float | None):
    sizes = {"0.q": (6, 9), "1.q": (6, 9), "2.q": (9, 6), "0.k": (6, 9)}
    torch.manual_seed(0)
    model = nn.ModuleDict({str(i): nn.ModuleDict() for i in range(3)})
    for name, (m, n) in sizes.items():
        model[name[0]][name[2]] = nn.Linear(n, m, bias=False, dtype=torch.float64)
    w = {name: model[name[0]][name[2]].weight.detach().numpy().copy() for name in sizes}
    adapter = attach(model, PiCa(rank=3, alpha=alpha, tied=tied))
    for name in sizes:
        f = at(adapter, name)
        near(f["A"], triplets(w[name], 3)[2])
        assert (f["L"] == 0).all()
    perturb(adapter)
    same = np.array_equal(at(adapter, "0.q")["L"], at(adapter, "1.q")["L"])
    assert same == tied
    for name, (_, n) in sizes.items():
        f = at(adapter, name)
        x = np.random.default_rng(1).standard_normal((3, n))
        update = (1.0 if alpha is None else 2.0) * f["L"] @ triplets(w[name], 3)[2]
        near(model[name[0]][name[2]](torch.from_numpy(x)), x @ (w[name] + update).T)
    assert adapter.trainable_count == 3 * (6 + 9 + 6 if tied else 6 + 6 + 9 + 6)


# -- TinyLoRA ------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("split", ["left", "both"])
@pytest.mark.parametrize("tie", [1, "all"])
def test_tinylora(shape: tuple[int, int], split: str, tie: Any):
    model, w, x = linear(shape)
    adapter = attach(model, TinyLoRA(rank=3, u=5, split=split, tie=tie))
    u, s, vh = triplets(w, 3)
    f = tensors(adapter)
    assert f["P"].shape == (5, 3, 3)
    assert f["v"].shape == (5,)
    assert (f["v"] == 0).all()
    perturb(adapter)
    f = tensors(adapter)
    core = sum(f["v"][i] * f["P"][i] for i in range(5))
    if split == "left":
        update = u @ np.diag(s) @ core @ vh
    else:
        update = u @ np.diag(np.sqrt(s)) @ core @ np.diag(np.sqrt(s)) @ vh
    near(output(model, x), x @ (w + update).T)
    assert adapter.trainable_count == 5


def test_tinylora_matrices_are_gaussian_and_each_sites_own():
    adapter = attach(several({"a": (30, 30), "b": (30, 30)})[0], TinyLoRA(rank=20, u=50, tie="all"))
    one, two = (at(adapter, name)["P"] * math.sqrt(20) for name in "ab")
    for p in (one, two):
        assert abs(p.mean()) < 0.03
        assert abs(p.std() - 1) < 0.03
        assert abs((np.abs(p) < 1).mean() - 0.6827) < 0.01
    assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.03


# -- k-means -------------------------------------------------------------------------------------------------


def lloyd_is_done(points: Array, labels: Array) -> bool:
    """Whether every row is nearest to the mean of its own cluster."""
    means = np.stack([points[labels == k].mean(0) for k in range(labels.max() + 1)])
    distances = ((points[:, None] - means) ** 2).sum(-1)
    return bool((distances[np.arange(len(points)), labels] <= distances.min(1) + 1e-12).all())


def test_kmeans_ends_where_lloyds_algorithm_stands_still():
    for seed in range(20):
        points = np.random.default_rng(seed).standard_normal((40, 3))
        labels = kmeans(torch.from_numpy(points), 4, seed, steps=100).numpy()
        assert set(labels) == {0, 1, 2, 3}
        assert lloyd_is_done(points, labels)
        first = [int(np.argmax(labels == k)) for k in range(4)]
        assert first == sorted(first)


def test_kmeans_finds_clusters_that_are_there():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 60)
    points = truth[:, None] * 100.0 + rng.standard_normal((60, 2))
    found = [kmeans(torch.from_numpy(points), 3, seed).numpy() for seed in range(10)]
    best = min(found, key=lambda labels: sum(points[labels == k].var(0).sum() for k in range(3)))
    assert all(len(set(truth[best == k])) == 1 for k in range(3))


@pytest.mark.parametrize(
    "points",
    [torch.zeros(5, 2), torch.tensor([[0.0], [0.0], [0.0], [9.0], [9.0]]), torch.eye(5), torch.full((5, 1), 1e-30)],
    ids=["equal", "two places", "as many as rows", "tiny"],
)
def test_kmeans_leaves_no_cluster_empty(points: torch.Tensor):
    for clusters in range(1, 6):
        for seed in range(5):
            labels = kmeans(points, clusters, seed)
            assert sorted(labels.unique().tolist()) == list(range(clusters))


def test_kmeans_of_a_batch_is_that_of_each():
    points = torch.randn(3, 2, 20, 4, dtype=torch.float64)
    together = kmeans(points, 3, seed=5)
    for i in range(3):
        for j in range(2):
            assert torch.equal(together[i, j], kmeans(points[i, j], 3, seed=5))


def test_kmeans_does_not_see_signs_and_refuses_more_clusters_than_rows():
    points = torch.randn(30, 4, dtype=torch.float64)
    assert torch.equal(kmeans(points, 4), kmeans(points * torch.tensor([1, -1, -1, 1]), 4))
    state = torch.get_rng_state()
    kmeans(points, 4)
    assert torch.equal(state, torch.get_rng_state())
    for clusters in (0, 31):
        with pytest.raises(ValueError, match=f"{clusters} clusters of 30 rows"):
            kmeans(points, clusters)


# -- AdaMSS --------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize(("clusters", "width"), [(1, 2), (2, 1), (3, 2), (20, 1)])
def test_adamss(shape: tuple[int, int], clusters: int, width: int):
    model, w, x = linear(shape)
    adapter = attach(model, AdaMSS(rank=4, clusters=clusters, cluster_rank=width))
    u, _, vh = triplets(w, 4)
    f, clusters = tensors(adapter), min(clusters, shape[0])
    near(f["V"], vh)
    assert (f["B"] == 0).all()
    rows = [np.flatnonzero(f["label"] == k) for k in range(clusters)]
    assert all(len(r) for r in rows)
    count = 0
    for k, c in enumerate(rows):
        a = f["A"][k * width : (k + 1) * width]
        near(a @ a.T, np.eye(width))
        values = np.zeros(4)
        values[: min(4, len(c))] = np.linalg.svd(u[c])[1]
        near(
            np.linalg.norm(u[c] @ a.T, axis=0), values[:width]
        )  # the leading directions; where values tie, any of them
        count += width * 4 + len(c) * width
    assert adapter.trainable_count == count
    perturb(adapter)
    f, update = tensors(adapter), np.zeros(shape)
    for k, c in enumerate(rows):
        update[c] = f["B"][c] @ f["A"][k * width : (k + 1) * width] @ vh
    near(output(model, x), x @ (w + update).T)


def test_adamss_clusters_are_those_of_the_singular_vectors():
    model, w, _ = linear((40, 12))
    f = tensors(attach(model, AdaMSS(rank=3, clusters=4)))
    u = triplets(w, 3)[0]
    assert lloyd_is_done(u, f["label"])
    assert set(f["label"]) == {0, 1, 2, 3}


def test_adamss_of_a_weight_with_rows_of_zeros():
    model, _, _ = linear((8, 6))
    with torch.no_grad():
        model["layer"].weight[3:] = 0
    adapter = attach(model, AdaMSS(rank=3, clusters=3, cluster_rank=2))
    assert all(bool(torch.isfinite(t).all()) for t in adapter.sites["layer"].factors.tensors().values())


# -- FRoD ----------------------------------------------------------------------------------------------------


def types(*sizes: tuple[int, int]) -> tuple[nn.ModuleDict, dict[str, Array]]:
    """One layer of one type per size, under the names 0, 1, …"""
    return several({str(i): size for i, size in enumerate(sizes)})


def signed(v: Array) -> Array:
    """Columns with their largest entry made positive."""
    return v * np.where(v[np.abs(v).argmax(0), np.arange(v.shape[1])] < 0, -1.0, 1.0)


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_frod_joint_basis(ridge: float):
    model, w = types((6, 5), (4, 5), (9, 5))
    adapter = attach(model, FRoD(ridge=ridge))
    q, r = np.linalg.qr(np.concatenate(list(w.values())))
    parts = np.split(q, [6, 10])
    mean = sum(np.linalg.inv(p.T @ p + ridge * np.eye(5)) for p in parts) / 3
    expected = signed(r.T @ np.linalg.eigh(mean)[1])
    for name in w:
        f = at(adapter, name)
        np.testing.assert_allclose(f["V"], expected, rtol=1e-8, atol=1e-9)
        near(np.linalg.norm(f["L"], axis=0), np.ones(5))
        np.testing.assert_allclose(f["L"] @ np.diag(f["C"]) @ f["V"].T, w[name], rtol=1e-8, atol=1e-9)
        assert (f["C"] > 0).all()


@pytest.mark.parametrize("sizes", [((9, 6),), ((6, 9),), ((3, 9), (4, 9))], ids=str)
def test_frod_without_a_joint_basis(sizes: tuple[tuple[int, int], ...]):
    """One weight alone, or fewer rows than columns: the right singular vectors."""
    model, w = types(*sizes)
    adapter = attach(model, FRoD())
    stacked = np.concatenate(list(w.values()))
    rank = min(stacked.shape)
    expected = np.linalg.svd(stacked)[2][:rank].T
    for name in w:
        f = at(adapter, name)
        near(f["V"].T @ f["V"], np.eye(stacked.shape[1]))
        near(f["V"][:, :rank], signed(expected))
        near(f["L"] @ np.diag(f["C"]) @ f["V"].T, w[name])
        assert (f["C"][rank:] == 0).all()
        assert (f["L"][:, rank:] == 0).all()


def test_frod_of_weights_of_deficient_rank():
    model, w = types((6, 5), (4, 5))
    with torch.no_grad():
        for name in w:
            model[name].weight[:, 2] = 0
            w[name][:, 2] = 0
    adapter = attach(model, FRoD())
    for name in w:
        f = at(adapter, name)
        near(f["L"] @ np.diag(f["C"]) @ f["V"].T, w[name])
        assert all(np.isfinite(t).all() for t in f.values())


@pytest.mark.parametrize(("density", "entries"), [(0.01, 1), (0.3, 7), (0.0, 0), (1.0, 20)])
def test_frod_forward(density: float, entries: int):
    model, w = types((6, 5), (4, 5))
    adapter = attach(model, FRoD(density=density))
    f = at(adapter, "0")
    i, j = np.divmod(f["index"], 5)
    assert len(set(f["index"])) == entries
    assert (i != j).all()
    assert (f["S"] == 0).all()
    assert adapter.trainable_count == 2 * (5 + entries)
    start = {name: at(adapter, name)["C"] for name in w}
    perturb(adapter)
    for name in w:
        f = at(adapter, name)
        s = np.zeros((5, 5))
        s[i, j] = f["S"]
        x = np.random.default_rng(1).standard_normal((3, 5))
        update = f["L"] @ (np.diag(f["C"]) + s) @ f["V"].T - f["L"] @ np.diag(start[name]) @ f["V"].T
        near(model[name](torch.from_numpy(x)), x @ (w[name] + update).T)
        # and that is the paper's weight, up to the error of the solve
        whole = f["L"] @ (np.diag(f["C"]) + s) @ f["V"].T
        np.testing.assert_allclose(w[name] + update, whole, rtol=1e-8, atol=1e-8)


def test_frod_positions_cover_everything_off_the_diagonal_evenly():
    hits = np.zeros((7, 7))
    for seed in range(200):
        index = at(attach(types((9, 7))[0], FRoD(density=0.2), seed=seed), "0")["index"]
        hits.flat[index] += 1
    assert (hits.diagonal() == 0).all()
    off = hits[~np.eye(7, dtype=bool)]
    assert off.min() > 20  # 9 of 42 in each: 43 expected
    assert off.max() < 75
    assert off.sum() == 200 * 9
