"""The methods that start from data, their papers' formulas in NumPy float64: CorDA, LoRA-Null, EVA, LoRA-GA."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import perturb
from oracle import Array, every_shape, linear, near, output, tensors, triplets
from torch import nn

from svdpeft import EVA, CorDA, LoRAGA, LoRANull, attach, calibrate
from svdpeft.adapter.adapter import Adapter
from svdpeft.methods.base import Statistics


def start(shape: tuple[int, int], method: Any) -> tuple[Adapter, nn.ModuleDict, Array, Array, Array, dict[str, Array]]:
    """An adapter from 40 inputs with a mean, and from a gradient: model, weight, test inputs, inputs, factors."""
    model, w, x = linear(shape)
    data = np.random.default_rng(5).standard_normal((40, shape[1])) * np.linspace(0.5, 2, shape[1]) + 0.4
    batches = [torch.from_numpy(part) for part in np.split(data, 4)]
    seen = calibrate(
        model,
        batches,
        ["layer"],
        gradients=True,
        loss=lambda out, batch: (out - 1).square().sum(),
        call=lambda model, batch: model["layer"](batch),
    )
    adapter = attach(model, method, ["layer"], calibration=seen)
    return adapter, model, w, x, data, tensors(adapter)


def check_forward(adapter: Adapter, model: nn.ModuleDict, w: Array, x: Array, begun: Array, scale: float) -> None:
    """x (W0 − s L₀A₀ + s L A)ᵀ, unfolded and folded; before training the base."""
    np.testing.assert_array_equal(adapter.delta("layer").numpy(), 0)
    perturb(adapter)
    f = tensors(adapter)
    expected = x @ (w - scale * begun + scale * f["L"] @ f["A"]).T
    near(output(model, x), expected)
    adapter.fold()
    near(model["layer"]._parameters["weight"], w - scale * begun)
    near(output(model, x), expected)


def up_to_sign(found: Array, expected: Array) -> None:
    """Rows are equal, each up to its sign."""
    sign = np.sign((found * expected).sum(-1, keepdims=True))
    near(found * sign, expected)


# -- CorDA ---------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_corda(shape: tuple[int, int], mode: Any, alpha: float | None):
    adapter, model, w, x, data, f = start(shape, CorDA(rank=3, mode=mode, alpha=alpha))
    c = data.T @ data / len(data)
    c += 0.01 * np.diag(c).mean() * np.eye(shape[1])
    u, s, vh = triplets(w @ c)
    pick = slice(0, 3) if mode == "ipm" else slice(-3, None)
    near(f["L"], u[:, pick] * np.sqrt(s[pick]))
    near(f["A"], np.sqrt(s[pick])[:, None] * vh[pick] @ np.linalg.inv(c))
    whole = (u * s) @ vh @ np.linalg.inv(c)
    near(whole, w)  # nothing is lost by the detour
    if mode == "ipm":  # of all rank-3 matrices the best in the metric of C
        near(np.linalg.norm((w - f["L"] @ f["A"]) @ c), np.sqrt((s[3:] ** 2).sum()))
    assert adapter.trainable_count == 3 * sum(shape)
    check_forward(adapter, model, w, x, f["L"] @ f["A"], 1.0 if alpha is None else 2.0)


def test_corda_damps_as_asked_and_stands_inputs_that_are_zero():
    _, _, w, _, data, f = start((6, 9), CorDA(rank=3, damp=0.5))
    c = data.T @ data / len(data)
    c += 0.5 * np.diag(c).mean() * np.eye(9)
    u, s, vh = triplets(w @ c, 3)
    near(f["L"] @ f["A"], (u * s) @ vh @ np.linalg.inv(c))
    model, w, _ = linear((6, 9))
    dead = {"layer": Statistics(4, torch.zeros(9, 9), torch.zeros(9))}
    f = tensors(attach(model, CorDA(rank=3), calibration=dead))
    u, s, vh = triplets(w, 3)
    near(f["L"] @ f["A"], (u * s) @ vh)  # no data, no metric: PiSSA's


# -- LoRA-Null -----------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_lora_null(shape: tuple[int, int], version: Any, alpha: float | None):
    adapter, model, w, x, data, f = start(shape, LoRANull(rank=3, version=version, alpha=alpha))
    null = np.linalg.svd(data.T @ data)[0][:, -3:]  # the last left singular vectors of the covariance
    u, s, vh = triplets(w @ null @ null.T, 3)
    near(f["L"], u * np.sqrt(s))
    near(f["A"], np.sqrt(s)[:, None] * vh)
    near(f["L"] @ f["A"], w @ null @ null.T)
    assert adapter.trainable_count == 3 * (sum(shape) if version == "v1" else shape[0])
    assert ("A0" in f) == (version == "v1")
    frozen = f["A"].copy()
    check_forward(adapter, model, w, x, f["L"] @ f["A"], 1.0 if alpha is None else 2.0)
    assert np.array_equal(tensors(adapter)["A"], frozen) == (version == "v2")


def test_lora_null_v2_does_not_touch_what_the_data_spans():
    """Inputs in a subspace, with r directions left: outputs for them never change."""
    model, _, _ = linear((6, 9))
    basis = torch.linalg.qr(torch.randn(9, 6, dtype=torch.float64)).Q
    data = torch.randn(50, 6, dtype=torch.float64) @ basis.mT
    seen = calibrate(model, [data], call=lambda model, batch: model["layer"](batch))
    before = model["layer"](data)
    adapter = attach(model, LoRANull(rank=3, version="v2"), calibration=seen)
    perturb(adapter)
    near(model["layer"](data), before.detach().numpy())
    other = torch.randn(4, 9, dtype=torch.float64)
    assert (model["layer"](other) - other @ model["layer"]._parameters["weight"].mT).abs().max() > 0.1


# -- EVA -----------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize(
    ("options", "scale"), [({}, 1.0), ({"alpha": 6.0}, 2.0), ({"alpha": 6.0, "rs": True}, 6 / 3**0.5)]
)
def test_eva(shape: tuple[int, int], centred: bool, whiten: bool, options: dict[str, Any], scale: float):
    adapter, model, w, x, data, f = start(shape, EVA(rank=3, centred=centred, whiten=whiten, **options))
    _, s, vh = np.linalg.svd(data - data.mean(0) * centred, full_matrices=False)
    up_to_sign(f["A"], vh[:3] / (np.sqrt(s[:3, None]) if whiten else 1))
    assert (f["A"][range(3), np.abs(f["A"]).argmax(1)] > 0).all()
    assert (f["L"] == 0).all()
    assert adapter.trainable_count == 3 * sum(shape)
    check_forward(adapter, model, w, x, np.zeros_like(w), scale)


WIDTHS = {"flat": 7, "steep": 8, "middle": 6}


def stack() -> tuple[nn.ModuleDict, dict[str, Array], dict[str, Statistics]]:
    """Three layers of different inputs: one sees all directions alike, one almost a single one."""
    model = nn.ModuleDict({name: nn.Linear(n, 9, dtype=torch.float64) for name, n in WIDTHS.items()})
    decay = {"flat": 1.0, "steep": 0.1, "middle": 0.7}
    random = np.random.default_rng(0)
    data = {name: random.standard_normal((60, n)) * decay[name] ** np.arange(n) for name, n in WIDTHS.items()}
    seen = {}
    for name, x in data.items():
        one = nn.ModuleDict({name: model[name]})
        batches = [torch.from_numpy(x)]
        seen |= calibrate(one, batches, [name], call=lambda m, batch: next(iter(m.values()))(batch))
    return model, data, seen


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("centred", [False, True])
def test_eva_shares_out_the_ranks_by_explained_variance(rho: float, centred: bool):
    model, data, seen = stack()
    rank = 2
    method = EVA(rank=rank, rho=rho, centred=centred, alpha=3.0)
    adapter = attach(model, method, list(WIDTHS), calibration=seen)
    shares = []
    for name, x in data.items():
        s2 = np.linalg.svd(x - x.mean(0) * centred, compute_uv=False) ** 2
        shares += [(share, name) for share in (s2 / s2.sum())[1 : round(rho * rank)]]
    expected = dict.fromkeys(WIDTHS, 1)  # one each, the rest to the largest
    for _, name in sorted(shares, reverse=True)[: rank * 3 - 3]:
        expected[name] += 1
    found = {name: site.method.rank for name, site in adapter.sites.items()}
    assert found == expected
    assert sum(found.values()) == 6
    assert max(found.values()) <= rho * rank
    assert (found["steep"] < found["flat"]) == (rho > 1)
    for name, site in adapter.sites.items():
        assert site.method.scale == pytest.approx(1.5, rel=1e-15)
        assert site.count == found[name] * (9 + WIDTHS[name])
        _, _, vh = np.linalg.svd(data[name] - data[name].mean(0) * centred)
        up_to_sign(site.factors.A.detach().numpy(), vh[: found[name]])


def test_eva_ranks_do_not_depend_on_the_order_of_sites_with_equal_inputs():
    found = []
    for names in ("abc", "cab"):
        model = nn.ModuleDict({name: nn.Linear(6, 5, dtype=torch.float64) for name in names})
        x = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        one = Statistics(30, x.T @ x, x.sum(0))
        adapter = attach(model, EVA(rank=2), list(names), calibration=dict.fromkeys(names, one))
        found.append({name: site.method.rank for name, site in adapter.sites.items()})
    assert found[0] == found[1]


def test_eva_gives_no_layer_more_rank_than_it_has_outputs():
    """The narrow one explains more with a third direction than the wide one with any, and has two outputs."""
    model = nn.ModuleDict({"narrow": nn.Linear(6, 2).double(), "wide": nn.Linear(6, 6).double()})
    flat, few = torch.eye(6).double(), torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])).double()
    seen = {name: Statistics(6, second, torch.zeros(6).double()) for name, second in (("narrow", few), ("wide", flat))}
    adapter = attach(model, EVA(rank=2), list(seen), calibration=seen)
    assert {name: site.method.rank for name, site in adapter.sites.items()} == {"narrow": 2, "wide": 2}


def test_eva_of_groups_shares_by_the_layer():
    """A grouped convolution is one site: its groups have one rank, by their share of the layer's variance."""
    model = nn.ModuleDict({"conv": nn.Conv1d(6, 8, 1, groups=2).double(), "fc": nn.Linear(6, 5).double()})
    size = torch.tensor([9.0, 0.1, 0.1, 9.0, 0.1, 0.1]).double()  # one direction per group; for the layer alike
    x = torch.randn(50, 6, dtype=torch.float64)
    seen = calibrate(model, [x], "all", call=lambda m, x: (m["conv"]((x * size).unsqueeze(-1)), m["fc"](x)))
    adapter = attach(model, EVA(rank=2), "all", calibration=seen)
    assert {name: site.method.rank for name, site in adapter.sites.items()} == {"conv": 1, "fc": 3}
    assert abs(adapter.sites["conv"].factors.A[:, 0, 0]).min() > 0.99


# -- LoRA-GA -------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("variant", ["paper", "peft"])
@pytest.mark.parametrize(
    ("options", "scale"), [({}, 16 / 3**0.5), ({"rs": False}, 16 / 3), ({"alpha": None, "rs": False}, 1)]
)
@pytest.mark.parametrize("gamma", [16.0, 4.0])
def test_lora_ga(shape: tuple[int, int], variant: Any, options: dict[str, Any], scale: float, gamma: float):
    adapter, model, w, x, data, f = start(shape, LoRAGA(rank=3, variant=variant, gamma=gamma, **options))
    bias = model["layer"].bias
    assert bias is None
    g = np.mean([2 * (part @ w.T - 1).T @ part for part in np.split(data, 4)], axis=0)  # of Σ (W x − 1)²
    u, s, vh = triplets(g)
    c = shape[0] ** 0.25 / gamma**0.5
    near(f["L"], c * u[:, 3:6] * (s[3:6] if variant == "peft" else 1))
    near(f["A"], vh[:3] * (c if variant == "paper" else 1))
    assert adapter.trainable_count == 3 * sum(shape)
    check_forward(adapter, model, w, x, f["L"] @ f["A"], scale)


def test_lora_ga_of_a_small_matrix_takes_the_last_triplets_there_are():
    _, _, w, _, data, f = start((4, 9), LoRAGA(rank=3))
    g = np.mean([2 * (part @ w.T - 1).T @ part for part in np.split(data, 4)], axis=0)
    u, _, vh = triplets(g)
    near(f["L"], 4**0.25 / 4 * u[:, 1:])
    near(f["A"], 4**0.25 / 4 * vh[:3])


def test_lora_ga_first_step_follows_the_gradient():
    """With the paper's factors a step of gradient descent on L and A moves W along the leading part of −G."""
    shape, r = (8, 9), 3
    adapter, _, _, _, _, f = start(shape, LoRAGA(rank=r))
    gradient = np.random.default_rng(1).standard_normal(shape)
    scale = adapter.sites["layer"].method.scale
    step = -1e-6 * scale * (gradient @ f["A"].T @ f["A"] + f["L"] @ f["L"].T @ gradient) * scale  # to first order
    site = adapter.sites["layer"]
    with torch.no_grad():
        g = torch.from_numpy(gradient)
        left, right = scale * g @ site.factors.A.mT, scale * site.factors.L.mT @ g
        site.factors.L -= 1e-6 * left
        site.factors.A -= 1e-6 * right
    np.testing.assert_allclose(adapter.delta("layer").numpy(), step, rtol=1e-3, atol=1e-9)


# -- hyper-parameters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: CorDA(mode="kpn"), "'kpn' is neither 'ipm' nor 'kpm'"),  # type: ignore[arg-type]
        (lambda: CorDA(damp=0.0), "damp 0.0 is not positive"),
        (lambda: LoRANull(version="v3"), "'v3' is neither 'v1' nor 'v2'"),  # type: ignore[arg-type]
        (lambda: EVA(rho=0.5), "rho 0.5 is less than 1"),
        (lambda: LoRAGA(gamma=0.0), "gamma 0.0 is not positive"),
        (lambda: LoRAGA(variant="code"), "'code' is neither 'paper' nor 'peft'"),  # type: ignore[arg-type]
        (lambda: LoRAGA(alpha=-1.0), "alpha -1.0 is not positive"),
    ],
)
def test_hyper_parameters_that_cannot_be(build: Any, words: str):
    with pytest.raises(ValueError, match=words):
        build()
