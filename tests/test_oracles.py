"""Every method's paper, written out in NumPy float64: nothing of the library on the right-hand side."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import perturb
from oracle import SHAPES, Array, every_shape, linear, near, output, tensors, triplets
from torch import nn

from svdpeft import SORSA, SVFT, Full, HeadOnly, LoRA, Partial, PiSSA, attach
from svdpeft.adapter.adapter import Adapter
from svdpeft.decomposition.orthonormality import orthonormality_error, orthonormality_gradient, polar

# -- LoRA ----------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize(
    ("options", "scale"),
    [({}, 1.0), ({"alpha": 6.0}, 2.0), ({"rs": True}, math.sqrt(3)), ({"rs": True, "alpha": 6.0}, 6 / math.sqrt(3))],
)
def test_lora(shape: tuple[int, int], options: dict[str, Any], scale: float):
    model, w, x = linear(shape)
    adapter = attach(model, LoRA(rank=3, **options))
    f = tensors(adapter)
    assert f.keys() == {"L", "A"}
    assert (f["L"] == 0).all()
    assert np.abs(f["A"]).max() <= 1 / math.sqrt(shape[1])
    perturb(adapter)
    f = tensors(adapter)
    near(output(model, x), x @ (w + scale * f["L"] @ f["A"]).T)
    assert adapter.trainable_count == 3 * sum(shape)


def test_lora_start_is_uniform():
    model = nn.ModuleDict({"layer": nn.Linear(400, 300)})
    a = tensors(attach(model, LoRA(rank=50)))["A"].ravel() * math.sqrt(400)
    assert abs(a.mean()) < 0.02
    assert abs(a.std() - 1 / math.sqrt(3)) < 0.01
    assert a.min() < -0.999
    assert a.max() > 0.999
    np.testing.assert_allclose(np.histogram(a, bins=10, range=(-1, 1))[0], len(a) / 10, rtol=0.1)


def test_lora_gaussian_start_has_the_deviation_of_peft():
    model = nn.ModuleDict({"layer": nn.Linear(400, 300)})
    a = tensors(attach(model, LoRA(rank=50, init="gaussian")))["A"]
    assert abs(a.std() * 50 - 1) < 0.02
    assert abs(a.mean()) < 1e-3
    with pytest.raises(ValueError, match="'normal' is neither"):
        LoRA(init="normal")  # type: ignore[arg-type]


# -- PiSSA ---------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_pissa(shape: tuple[int, int], alpha: float | None):
    model, w, x = linear(shape)
    adapter = attach(model, PiSSA(rank=3, alpha=alpha))
    u, s, vh = triplets(w, 3)
    start = tensors(adapter)
    near(start["L"], u * np.sqrt(s))
    near(start["A"], np.sqrt(s)[:, None] * vh)
    perturb(adapter)
    f, scale = tensors(adapter), 1.0 if alpha is None else 2.0
    residual = w - scale * (u * s) @ vh
    near(output(model, x), x @ (residual + scale * f["L"] @ f["A"]).T)
    adapter.fold()
    near(model["layer"]._parameters["weight"], residual)
    near(output(model, x), x @ (residual + scale * f["L"] @ f["A"]).T)
    if alpha is None:  # the residual is the tail of the spectrum
        tail_u, tail_s, tail_vh = np.linalg.svd(w, full_matrices=False)
        near(residual, (tail_u[:, 3:] * tail_s[3:]) @ tail_vh[3:])
    assert adapter.trainable_count == 3 * sum(shape)


# -- SORSA ---------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_sorsa_forward(shape: tuple[int, int], alpha: float | None):
    model, w, x = linear(shape)
    adapter = attach(model, SORSA(rank=3, alpha=alpha))
    u, s, vh = triplets(w, 3)
    start = tensors(adapter)
    near(start["L"], u)
    near(start["C"], s)
    near(start["A"], vh)
    perturb(adapter)
    f, scale = tensors(adapter), 1.0 if alpha is None else 2.0
    expected = x @ (w - scale * (u * s) @ vh + scale * f["L"] @ np.diag(f["C"]) @ f["A"]).T
    near(output(model, x), expected)
    assert adapter.trainable_count == 3 * (sum(shape) + 1)


def regulariser(q: Array, squared: bool = False) -> tuple[float, Array]:
    """‖QᵀQ − I‖_F (or its square) and its gradient by central differences: no formula to copy a mistake from."""

    def value(q: Array) -> float:
        total = sum((((q.T @ q) - np.eye(q.shape[1])) ** 2).ravel())
        return total if squared else math.sqrt(total)

    slope, h = np.zeros_like(q), 1e-6
    for i in np.ndindex(*q.shape):
        step = np.zeros_like(q)
        step[i] = h
        slope[i] = (value(q + step) - value(q - step)) / (2 * h)
    return value(q), slope


def sorsa_sites(**options: Any) -> tuple[nn.ModuleDict, Adapter, dict[str, Array]]:
    """Two sites of different shapes and a grouped convolution, off their start; the bases by name, as columns."""
    torch.manual_seed(3)
    f = {"dtype": torch.float64}
    model = nn.ModuleDict(
        {"a": nn.Linear(5, 4, **f), "b": nn.Linear(3, 6, **f), "c": nn.Conv1d(4, 6, 3, groups=2, **f)}
    )
    adapter = attach(model, SORSA(rank=2, **options), targets="all")
    perturb(adapter, size=0.1)
    return model, adapter, bases_of(adapter)


def bases_of(adapter: Adapter) -> dict[str, Array]:
    found = {}
    for name, site in adapter.sites.items():
        for role, t in (("L", site.factors.L), ("A", site.factors.A.mT)):
            for i, q in enumerate(t.detach().reshape(-1, *t.shape[-2:])):
                found[f"{name}/{role}{i}"] = q.numpy().copy()
    return found


@pytest.mark.parametrize("norm", ["frobenius", "squared"])
@pytest.mark.parametrize("lr_scale", [1.0, 0.25])
def test_sorsa_decoupled_step(norm: str, lr_scale: float):
    """L ← L − γ (lr_t/lr_peak) ∂L_reg, after the optimizer's step; σ is not touched."""
    _, adapter, before = sorsa_sites(gamma=0.03, norm=norm)
    cores = {name: site.factors.C.detach().clone() for name, site in adapter.sites.items()}
    assert adapter.penalty() is None
    adapter.after_step(lr_scale)
    for name, q in bases_of(adapter).items():
        _, slope = regulariser(before[name], norm == "squared")
        np.testing.assert_allclose(q, before[name] - 0.03 * lr_scale * slope, rtol=1e-7, atol=1e-9)
        assert np.abs(slope).max() > 0.1
    assert all(torch.equal(site.factors.C, cores[name]) for name, site in adapter.sites.items())


@pytest.mark.parametrize("norm", ["frobenius", "squared"])
def test_sorsa_loss_mode(norm: str):
    _model, adapter, before = sorsa_sites(gamma=0.03, mode="loss", norm=norm)
    penalty = adapter.penalty()
    near(penalty, 0.03 * sum(regulariser(q, norm == "squared")[0] for q in before.values()))
    penalty.backward()
    for name, site in adapter.sites.items():
        for role, grad in (("L", site.factors.L.grad), ("A", site.factors.A.grad.mT)):
            for i, g in enumerate(grad.reshape(-1, *grad.shape[-2:])):
                slope = 0.03 * regulariser(before[f"{name}/{role}{i}"], norm == "squared")[1]
                np.testing.assert_allclose(g.numpy(), slope, rtol=1e-7, atol=1e-9)
        assert site.factors.C.grad is None
    adapter.after_step(1.0)
    assert all((q == before[name]).all() for name, q in bases_of(adapter).items())


def test_sorsa_gradient_mode_is_the_official_code():
    """(γ / lr_peak) · mean over every factor of the model, added to what the loss has left in .grad."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(5, 4, dtype=torch.float64), "b": nn.Linear(3, 6, dtype=torch.float64)})
    adapter = attach(model, SORSA(rank=2, gamma=0.03, mode="gradient"))
    perturb(adapter, size=0.1)
    before = bases_of(adapter)
    (model["a"](torch.ones(5, dtype=torch.float64)).sum()).backward()  # "b" gets no gradient from this loss
    task = {name: None if p.grad is None else p.grad.clone() for name, p in adapter.named_parameters()}
    assert adapter.penalty() is None
    adapter.before_step(peak_lr=2e-3)
    for name, site in adapter.sites.items():
        for role, grad in (("L", site.factors.L.grad), ("A", site.factors.A.grad.mT)):
            own = task[f"{name}/{role}"]
            own = np.zeros(grad.shape) if own is None else (own if role == "L" else own.mT).numpy()
            slope = 0.03 / 2e-3 / 4 * regulariser(before[f"{name}/{role}0"])[1]
            np.testing.assert_allclose(grad.numpy(), own + slope, rtol=1e-6, atol=1e-8)
    assert all((q == before[name]).all() for name, q in bases_of(adapter).items())
    adapter.after_step(1.0)
    assert all((q == before[name]).all() for name, q in bases_of(adapter).items())


def test_sorsa_retract_is_the_polar_factor():
    _, adapter, before = sorsa_sites(mode="retract")
    adapter.after_step(0.1)
    for name, q in bases_of(adapter).items():
        u, _, vh = np.linalg.svd(before[name], full_matrices=False)
        near(q, u @ vh)
        near(q.T @ q, np.eye(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["decoupled", "gradient", "loss"])
def test_sorsa_regulariser_is_silent_at_the_start(mode: Any, dtype: torch.dtype):
    """There QᵀQ − I is rounding noise, whose un-squared norm would still pull with a slope of two."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(300, 200, dtype=dtype)})
    adapter = attach(model, SORSA(rank=64, gamma=1.0, mode=mode))
    before = tensors(adapter)
    penalty = adapter.penalty()
    assert penalty is None or float(penalty.detach()) == 0.0
    if penalty is not None:
        penalty.backward()
    adapter.before_step(1e-3)
    for name, p in adapter.named_parameters():
        assert p.grad is None or bool((p.grad == 0).all()), name
    adapter.after_step(1.0)
    assert all((t == before[k]).all() for k, t in tensors(adapter).items())


def test_sorsa_noise_floor_is_close_to_the_noise():
    """A basis that is off by a hundred times its rounding is pulled back."""
    q = torch.linalg.qr(torch.randn(200, 16, dtype=torch.float64)).Q.float()
    assert float(orthonormality_error(q)) == 0.0
    off = q * (1 + 1e-4)
    assert float(orthonormality_error(off)) > 0
    assert float(orthonormality_gradient(off).norm()) == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("norm", ["frobenius", "squared"])
def test_sorsa_closed_form_is_autograd(norm: str):
    q = torch.randn(3, 7, 4, dtype=torch.float64, requires_grad=True)
    orthonormality_error(q, norm).sum().backward()
    near(orthonormality_gradient(q.detach(), norm), q.grad)


def test_polar_is_the_nearest_orthonormal_matrix():
    q = torch.randn(2, 6, 3, dtype=torch.float64)
    near(polar(q).mT @ polar(q), np.broadcast_to(np.eye(3), (2, 3, 3)))
    best = torch.linalg.matrix_norm(q - polar(q))
    for seed in range(20):
        torch.manual_seed(seed)
        other = torch.linalg.qr(polar(q) + 0.05 * torch.randn_like(q)).Q
        signs = (other * polar(q)).sum(-2, keepdim=True).sign()
        assert bool((torch.linalg.matrix_norm(q - other * signs) > best).all())


# -- SVFT ----------------------------------------------------------------------------------------------------


def dense_core(f: dict[str, Array], k: int) -> Array:
    m = np.zeros((k, k))
    values = f["C"] / (1 + np.exp(-f["gate"])) if "gate" in f else f["C"]
    index = f.get("index", np.arange(k) * (k + 1))
    for position, value in zip(index, values, strict=True):
        m[position // k, position % k] += value
    return m


@every_shape
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("pattern", ["plain", "banded", "random", "topk"])
def test_svft(shape: tuple[int, int], rank: int | None, pattern: Any):
    model, w, x = linear(shape)
    adapter = attach(model, SVFT(rank=rank, pattern=pattern, off_diagonals=1))
    k = rank or min(shape)
    u, s, vh = triplets(w, k)
    start = tensors(adapter)
    near(start["L"], u)
    near(start["A"], vh)
    near(start["sigma"], s)
    assert (start["C"] == 0).all()
    count = k if pattern == "plain" else 3 * k - 2
    assert adapter.trainable_count == start["C"].size == count
    perturb(adapter)
    f = tensors(adapter)
    m = dense_core(f, k)
    near(output(model, x), x @ (w + u @ m @ vh).T)  # what a smaller rank leaves out stays in the weight
    adapter.fold()
    near(output(model, x), x @ (w - (u * s) @ vh + u @ (np.diag(s) + m) @ vh).T)
    if rank is not None:
        near(model["layer"]._parameters["weight"], w - (u * s) @ vh)


@pytest.mark.parametrize("d", [0, 1, 2, 5, 50])
def test_svft_band(d: int):
    model, _, _ = linear((6, 9))
    index = tensors(attach(model, SVFT(pattern="banded", off_diagonals=d)))["index"]
    assert set(index) == {i * 6 + j for i in range(6) for j in range(6) if abs(i - j) <= d}
    inside = min(d, 5)
    assert len(index) == 6 * (2 * inside + 1) - inside * (inside + 1)


def test_svft_random_positions_are_different_and_from_the_seed():
    drawn = []
    for seed in (0, 0, 1):
        model, _, _ = linear((20, 30))
        drawn.append(tensors(attach(model, SVFT(pattern="random", off_diagonals=4), seed=seed))["index"])
    assert len(set(drawn[0])) == len(drawn[0]) == 20 * 9 - 20
    assert drawn[0].min() >= 0
    assert drawn[0].max() < 400
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()
    assert len({i // 20 for i in drawn[0]}) > 15
    assert len({i % 20 for i in drawn[0]}) > 15


@every_shape
@pytest.mark.parametrize("rank", [None, 4])
def test_svft_topk_takes_the_best_aligned_pairs(shape: tuple[int, int], rank: int | None):
    model, w, _ = linear(shape)
    index = tensors(attach(model, SVFT(rank=rank, pattern="topk", off_diagonals=1)))["index"]
    u, _, vh = triplets(w, rank)
    k, shared = len(vh), min(shape)
    score = np.zeros((k, k))
    for i in range(k):
        for j in range(k):  # |⟨u_i, v_j⟩| on the coordinates that both have
            score[i, j] = abs(sum(u[c, i] * vh[j, c] for c in range(shared)))
    best = np.argsort(-score.ravel(), kind="stable")[: 3 * k - 2]
    assert set(index) == set(best)
    assert len(set(index)) == 3 * k - 2


def test_svft_topk_of_a_grouped_convolution_is_per_group():
    torch.manual_seed(0)
    layer = nn.Conv1d(6, 8, 2, groups=2, dtype=torch.float64)
    model = nn.ModuleDict({"layer": layer})
    adapter = attach(model, SVFT(pattern="topk", off_diagonals=1), targets="all")
    index = tensors(adapter)["index"]
    for g in range(2):
        u, _, vh = triplets(layer._parameters["weight"].detach().numpy().reshape(2, 4, 6)[g])
        score = np.abs(u.T @ vh[:, :4].T)
        assert set(index[g]) == set(np.argsort(-score.ravel())[:10])


@pytest.mark.parametrize("shape", [(40, 60), (200, 150), (300, 300)])
@pytest.mark.parametrize("pattern", ["plain", "banded", "random"])
def test_svft_official_start_has_the_same_size_everywhere(shape: tuple[int, int], pattern: Any):
    """√(2/K) times sigmoid(0) on K entries: 1/√2 whatever the layer's size."""
    sizes = []
    for seed in range(6):
        model, _, _ = linear(shape, seed)
        adapter = attach(model, SVFT(pattern=pattern, off_diagonals=2, reference_init=True), seed=seed)
        f = tensors(adapter)
        assert f["gate"] == 0
        near(np.linalg.norm(adapter.delta("layer").numpy()), np.linalg.norm(dense_core(f, min(shape))))
        sizes.append(np.linalg.norm(dense_core(f, min(shape))))
    assert np.mean(sizes) == pytest.approx(math.sqrt(0.5), rel=0.1)


def test_svft_official_start_forward_and_gate():
    model, w, x = linear((9, 6))
    adapter = attach(model, SVFT(pattern="random", off_diagonals=1, reference_init=True))
    u, _, vh = triplets(w)
    perturb(adapter)
    f = tensors(adapter)
    assert f["gate"] != 0
    near(output(model, x), x @ (w + u @ dense_core(f, 6) @ vh).T)
    assert adapter.trainable_count == 16 + 1


def test_svft_official_random_positions_repeat_and_add_up():
    model, w, x = linear((20, 30))
    adapter = attach(model, SVFT(pattern="random", off_diagonals=6, reference_init=True))
    f = tensors(adapter)
    assert len(set(f["index"])) < len(f["index"]) == 20 * 13 - 42
    u, _, vh = triplets(w)
    near(output(model, x), x @ (w + u @ dense_core(f, 20) @ vh).T)


def test_svft_official_topk_ranks_signed_entries_of_the_wrong_product():
    for shape in SHAPES:
        model, w, _ = linear(shape)
        index = tensors(attach(model, SVFT(pattern="topk", off_diagonals=1, reference_init=True)))["index"]
        u, _, vh = triplets(w)
        k = min(shape)
        wrong = u @ vh.T if shape[0] == shape[1] else (u if u.shape == (k, k) else vh)  # U·V, or the square factor
        assert set(index) == set(np.argsort(-wrong.ravel())[: 3 * k - 2])


# -- baselines -----------------------------------------------------------------------------------------------


def net() -> nn.Module:
    layers = {"stem": nn.Linear(4, 6), "norm": nn.LayerNorm(6), "body": nn.Linear(6, 5), "head": nn.Linear(5, 2)}
    return nn.ModuleDict(layers)


@pytest.mark.parametrize(
    ("method", "train", "names"),
    [
        (Full(), (), "stem.weight stem.bias norm.weight norm.bias body.weight body.bias head.weight head.bias"),
        (Partial(layers=("body",)), (), "body.weight body.bias"),
        (Partial(layers=["norm", "stem.bias"]), (), "stem.bias norm.weight norm.bias"),  # type: ignore[arg-type]
        (Partial(layers=("norm",)), ("head",), "norm.weight norm.bias head.weight head.bias"),
        (HeadOnly(), ("head",), "head.weight head.bias"),
        (HeadOnly(), (r".*\.bias",), "stem.bias norm.bias body.bias head.bias"),
    ],
    ids=str,
)
def test_baselines_train_exactly_what_they_name(method: Any, train: tuple[str, ...], names: str):
    model = net()
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapter = attach(model, method, train=train)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == names.split()
    assert sorted(n for n, _ in adapter.named_parameters()) == sorted(names.split())
    assert adapter.roles().keys() == {"whole"}
    assert not adapter.sites
    perturb(adapter)
    for n, p in model.named_parameters():
        assert torch.equal(p, values[n]) == (n not in names.split())
    adapter.detach()
    assert all(torch.equal(p, values[n]) and p.requires_grad for n, p in model.named_parameters())
