"""``svdpeft.quantize``: the published algorithms as oracles, what stays, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import perturb, refused
from torch import Tensor, nn

import svdpeft
from svdpeft import SORSA, SVFT, DoRA, LoRA, MiLoRA, PiSSA, attach, load, quantize
from svdpeft.layers.quantised import form_of, weight
from svdpeft.layers.quantising import SCHEMES, scheme_named
from svdpeft.methods.base import Statistics


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 3))


def nf4(w: Tensor) -> Tensor:
    return scheme_named("nf4")(w).values()


def low(w: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def qpissa(w: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    """As in the authors' code: SVD of what is left, then quantise."""
    rest = w
    for _ in range(iterations):
        ab = low(rest, rank)
        q = nf4(w - ab)
        rest = w - q
    return q, ab


def loftq(w: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper."""
    ab = torch.zeros_like(w)
    for _ in range(iterations):
        q = nf4(w - ab)
        ab = low(w - q, rank)
    return q, ab


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize(
    ("method", "oracle"),
    [(PiSSA(8), qpissa), (SORSA(8), qpissa), (LoRA(8), loftq), (LoRA(8, alpha=16), loftq)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_published_algorithms(method: Any, oracle: Any, iterations: int, tmp_path: Path):
    model, x = net(), torch.randn(4, 64)
    w = model[0].weight.detach().clone()
    adapter = attach(model, method, ["0"])
    report = quantize(model, adapter, "nf4", iterations)
    q, ab = oracle(w, 8, iterations)
    torch.testing.assert_close(weight(model[0], "weight"), q)
    torch.testing.assert_close(adapter.delta("0"), ab, rtol=1e-4, atol=1e-5)
    loss, error = report.losses["0"], w - q - ab
    assert loss.nuclear == pytest.approx(float(torch.linalg.svdvals(error).sum()), rel=1e-4)
    assert loss.frobenius == pytest.approx(float(error.norm()), rel=1e-4)
    assert loss.plain_frobenius == pytest.approx(float((w - nf4(w)).norm()), rel=1e-4)
    assert report.left == {"2": "not adapted", "4": "not adapted"}
    assert "1 layers in nf4" in str(report)
    perturb(adapter)
    out = model(x)
    with adapter.disabled():  # the quantised model
        torch.testing.assert_close(model[0](x), x @ q.T + model[0].bias)
    adapter.save(tmp_path)
    adapter.detach()
    assert form_of(model[0], "weight").scheme == "nf4"
    load(model, tmp_path)
    assert torch.equal(model(x), out)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_more_iterations_lose_less_and_the_outputs_are_nearer(scheme: str):
    lost, off, x = [], [], torch.randn(16, 64)
    for iterations in (0, 1, 5):
        model = net()
        before = model(x)
        report = quantize(model, attach(model, PiSSA(rank=16), ["0", "2"]), scheme, iterations)
        lost.append(sum(loss.nuclear for loss in report.losses.values()))
        off.append(float((model(x) - before).detach().norm()))
    assert max(lost[:2]) > lost[2]
    assert off[0] > off[2]


def test_without_an_adapter_every_linear_layer_but_the_head_and_those_that_share():
    model = net()
    model.append(nn.Embedding(7, 5))
    model[2].weight = nn.Parameter(torch.randn(64, 96))
    model.append(nn.Linear(96, 64, bias=False))
    model[6].weight = model[2].weight
    report = quantize(model, scheme="nf4", iterations=0, nuclear=False)
    assert report.losses.keys() == {"0", "4"}
    assert report.left == {"2": "its weight is shared", "5": "a Embedding", "6": "its weight is shared"}
    adapter = attach(model, SORSA(rank=2), ["0"])
    with refused(model, "quantised already (nf4)"):
        quantize(model, adapter)


def test_what_a_method_cannot_take_up_is_said():
    for method in (DoRA(LoRA(rank=2)), SVFT(), svdpeft.LoRAXS(rank=2), svdpeft.OFT(block_size=8)):
        model = net()
        adapter = attach(model, method, ["0"])
        with refused(model, "0: the update of", "no free product", "iterations=0"):
            quantize(model, adapter)
        quantize(model, adapter, iterations=0)
        assert form_of(model[0], "weight").scheme == "nf4"
    model = net()
    report = quantize(model, attach(model, MiLoRA(rank=2), ["0"]), iterations=1)
    assert report.losses["0"].frobenius > 0


def test_bad_input():
    model = net()
    adapter = attach(model, PiSSA(rank=2), ["0"])
    for options, words in (
        ({"scheme": "nf5"}, "scheme 'nf5'"),
        ({"iterations": -1}, "iterations -1 is no whole number"),
        ({"iterations": 2.5}, "iterations 2.5 is no whole number"),
    ):
        with refused(model, words):
            quantize(model, adapter, **options)
    with refused(model, "the model has an adapter"):
        quantize(model)
    other = attach(model, LoRA(rank=2), ["2"], name="other")
    with refused(model, "'other' is on the model, too"):
        quantize(model, adapter)
    other.detach()
    perturb(adapter)
    with refused(model, "0 is not at its start", "quantize before training"):
        quantize(model, adapter)
    adapter.detach()
    with refused(model, "not attached to this model"):
        quantize(model, adapter)
    conv = nn.Sequential(nn.Conv1d(64, 32, 1))
    with refused(conv, "0 cannot be quantised: it is a Conv1d"):
        twin = copy.deepcopy(conv)
        quantize(twin, attach(twin, LoRA(rank=2), ["0"]))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("svdpeft.layers.quantising.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"scheme 'nf4' needs bitsandbytes: pip install 'svdpeft\[quantised\]'"):
        quantize(net())


# -- QERA ------------------------------------------------------------------------------------------------------


def seen(model: nn.Module, x: Tensor) -> svdpeft.Calibration:
    return svdpeft.calibrate(model, x.split(50), ["0"])


def skewed() -> Tensor:
    """Inputs of very different sizes that correlate."""
    torch.manual_seed(1)
    mixed = torch.randn(64, 64) / 8 + torch.eye(64)
    return torch.randn(200, 64) @ (mixed * torch.logspace(-1.5, 1, 64))


@pytest.mark.parametrize("moments", ["full", "diagonal"])
@pytest.mark.parametrize("method", [LoRA(8), LoRA(8, alpha=16), SORSA(8)], ids=str)
def test_qera(method: Any, moments: Any):
    """The paper's two theorems, in float64: of all products of the rank the best for the outputs."""
    model, x = net(), skewed()
    w = model[0].weight.detach().double()
    calibration = seen(model, x)
    adapter = attach(model, method, ["0"])
    begins = isinstance(method, SORSA)
    report = quantize(model, adapter, "nf4", iterations=2 if begins else 1, calibration=calibration, moments=moments)
    q = weight(model[0], "weight").double()
    second = x.double().mT @ x.double() / len(x)
    if moments == "diagonal":
        second = second.diagonal().diag()
    values, vectors = torch.linalg.eigh(second)
    root = vectors * values.sqrt() @ vectors.mT
    ab = low((w - q) @ root, 8) @ torch.linalg.inv(root)
    if begins:  # Q is quantised anew, beside the product that was found for the Q before
        rest = w - nf4((w - low(w, 8)).float()).double()
        ab = low(rest @ root, 8) @ torch.linalg.inv(root)
        torch.testing.assert_close(nf4((w - ab).float()).double(), q)
    torch.testing.assert_close(adapter.delta("0").double(), ab, rtol=1e-3, atol=1e-4)
    loss, error = report.losses["0"], w - q - ab
    off = lambda e: float((x.double() @ e.mT).square().sum(-1).mean().sqrt())  # noqa: E731
    assert loss.output == pytest.approx(off(error), rel=1e-3)
    assert loss.plain_output == pytest.approx(off(w - nf4(w.float()).double()), rel=1e-3)
    assert f"{report.reduction('output'):.1%} in the outputs" in str(report)


def test_inputs_tell_what_to_take_up():
    """Without them the outputs are farther off, with them the weights."""
    lost = []
    for calibrated in (False, True):
        model, x = net(), skewed()
        calibration = seen(model, x)
        before = model[0](x).detach()
        adapter = attach(model, LoRA(rank=8), ["0"])
        report = quantize(model, adapter, iterations=1, calibration=calibration if calibrated else None)
        lost.append((float((model[0](x) - before).detach().norm()), report.losses["0"].frobenius))
    assert lost[1][0] < 0.8 * lost[0][0]
    assert lost[1][1] > lost[0][1]


def test_inputs_that_reach_few_directions_or_none():
    model, x = net(), skewed()
    few = {"0": Statistics(1, x[:1].mT @ x[:1], x[0])}
    none = {"0": Statistics(1, torch.zeros(64, 64), torch.zeros(64))}
    for calibration in (few, none):
        twin = copy.deepcopy(model)
        adapter = attach(twin, LoRA(rank=8), ["0"])
        quantize(twin, adapter, iterations=1, calibration=calibration)
        assert bool(adapter.delta("0").isfinite().all())
        if calibration is few:  # one input's outputs are one direction
            torch.testing.assert_close(twin[0](x[:1]), model[0](x[:1]), rtol=1e-4, atol=1e-4)
    w: Any = model[0].weight.detach()
    torch.testing.assert_close(adapter.delta("0"), low(w - nf4(w), 8), rtol=1e-4, atol=1e-5)  # LoftQ's


def test_a_calibration_that_is_of_no_use_is_refused():
    model, x = net(), skewed()
    calibration = seen(model, x)
    with refused(model, "a calibration says what an adapter takes up"):
        quantize(model, calibration=calibration)
    adapter = attach(model, PiSSA(rank=2), ["0"])
    for options, words in (
        ({"iterations": 0}, "at least one iteration"),
        ({"iterations": 1}, "0: PiSSA begins with its own start"),
        ({"moments": "none"}, "moments 'none' is neither"),
        ({"calibration": {}}, "the calibration saw no inputs of 0, which takes 64"),
        ({"calibration": svdpeft.calibrate(net(), [x], ["2"])}, "saw no inputs of 0"),
    ):
        with refused(model, words):
            quantize(model, adapter, **{"calibration": calibration, **options})
