"""CorDA, EVA and LoRA-GA against Hugging Face PEFT: the same weights, the same data, the same start and forward."""

import copy
import dataclasses
import importlib
import sys

import pytest
import torch
from torch import nn

import svdpeft

peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

TARGETS = ["first", "second"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(9, 12), nn.Linear(12, 7)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def layer_of(model, name):
    layer = getattr(model.base_model.model, name)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]


def same_up_to_sign(ours, theirs, rtol=1e-3, atol=1e-4):
    """Rows are equal, each up to its sign."""
    sign = (ours * theirs).sum(-1, keepdim=True).sign()
    torch.testing.assert_close(ours * sign, theirs, rtol=rtol, atol=atol)


# -- CorDA ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("alpha", [3, 6])
def test_corda(mode, alpha, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "attr", dataclasses
    )  # PEFT takes its decorator from attrs, and does not ask for it
    corda = importlib.import_module("peft.tuners.lora.corda")
    base, data = Net(), torch.randn(1, 60, 9)
    sub = peft.tuners.lora.config.CordaConfig(corda_method=mode)
    config = peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights="corda", corda_config=sub)
    theirs = copy.deepcopy(base)
    corda.preprocess_corda(theirs, config, run_model=lambda: theirs(data))
    theirs = peft.get_peft_model(theirs, config)
    seen = svdpeft.calibrate(base, [data])
    adapter = svdpeft.attach(base, svdpeft.CorDA(rank=3, alpha=alpha, mode=mode), calibration=seen)
    hidden = {"first": data[0], "second": torch.tanh(base.first(data))[0].detach()}
    x = torch.randn(5, 9)
    expected = theirs(x)
    for name in TARGETS:
        f, (a, b, scale) = adapter.sites[name].factors, layer_of(theirs, name)
        # PEFT: C of inputs over their largest entry, summed over the positions of a batch; ours: the mean of all.
        size = (len(hidden[name]) / hidden[name].max() ** 2).sqrt()
        # PEFT: Σ divided by the scale, so that s L A is the same for every alpha; ours: L A is.
        same_up_to_sign(f.L.mT * size / scale**0.5, b.mT)
        same_up_to_sign(f.A / size / scale**0.5, a)
        torch.testing.assert_close(scale * b @ a, f.L @ f.A, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(expected, base(x), rtol=1e-4, atol=1e-4)
    if alpha == 3:  # the scale is 1: then the residuals are the same, and so is the forward of trained factors
        with torch.no_grad():
            for name in TARGETS:
                f, (a, b, _) = adapter.sites[name].factors, layer_of(theirs, name)
                for ours, other in ((f.A, a), (f.L, b)):
                    ours.add_(0.1 * torch.randn_like(ours))
                    other.copy_(ours)
        torch.testing.assert_close(theirs(x), base(x), rtol=1e-3, atol=1e-3)


# -- EVA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("rho", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [3, 6])
def test_eva(whiten, rho, alpha):
    base = Net()
    data = torch.randn(200, 9) * 0.2 ** torch.arange(9) + 0.5  # the first layer's inputs vary along one direction,
    spread = torch.linalg.qr(torch.randn(12, 9)).Q  # the second layer's along many
    with torch.no_grad():
        base.first.weight.copy_(0.2 * spread * (0.75 / 0.2) ** torch.arange(9))
        base.first.bias.copy_(-0.5 * base.first.weight.sum(1))
    sub = peft.EvaConfig(rho=rho, whiten=whiten)
    config = peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights="eva", eva_config=sub)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    peft.initialize_lora_eva_weights(
        theirs,
        [data],
        forward_fn=lambda model, batch: model(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    method = svdpeft.EVA(rank=3, alpha=alpha, rho=rho, whiten=whiten, centred=True)  # PEFT subtracts the mean
    adapter = svdpeft.attach(base, method, calibration=svdpeft.calibrate(base, [data]))
    ranks = {name: site.method.rank for name, site in adapter.sites.items()}
    assert ranks == {name: len(layer_of(theirs, name)[0]) for name in TARGETS}
    assert (len(set(ranks.values())) > 1) == (rho > 1), "the data were made for ranks that differ"
    move = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in TARGETS:
            f, (a, b, s) = adapter.sites[name].factors, layer_of(theirs, name)
            # PEFT goes over the data more than once until the directions stand still, each time with those before: the
            # directions are the same, the singular values grow with the passes, and with them the whitening.
            passes = (f.A.norm(dim=-1) / a.norm(dim=-1)).mean() if whiten else 1.0
            same_up_to_sign(f.A / passes, a, rtol=2e-2, atol=5e-3)
            assert s == pytest.approx(adapter.sites[name].method.scale)  # kept, whatever the rank
            assert (b == 0).all()
            f.L.copy_(torch.randn(f.L.shape, generator=move))
            a.copy_(f.A)
            b.copy_(f.L)
    x = torch.randn(5, 9)
    torch.testing.assert_close(theirs(x), base(x), rtol=1e-4, atol=1e-4)


# -- LoRA-GA -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rs", [False, True])
def test_lora_ga(rs):
    base, batches = Net(), [torch.randn(20, 9) for _ in range(3)]
    sub = peft.LoraGAConfig(stable_gamma=9)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, use_rslora=rs, target_modules=TARGETS, init_lora_weights="lora_ga", lora_ga_config=sub
    )

    def loss(out, batch):
        return (out - 1).square().sum()

    theirs = copy.deepcopy(base)

    def train_step():
        for batch in batches:
            loss(theirs(batch), batch).backward()

    peft.tuners.lora.loraga.preprocess_loraga(theirs, config, train_step)
    theirs = peft.get_peft_model(theirs, config)
    seen = svdpeft.calibrate(base, batches, inputs=False, gradients=True, loss=loss)
    x, start = torch.randn(5, 9), {}
    for variant in ("paper", "peft"):
        method = svdpeft.LoRAGA(rank=2, alpha=4.0, rs=rs, gamma=9.0, variant=variant)
        adapter = svdpeft.attach(base, method, calibration=seen, name=variant)
        start[variant] = {name: site.factors.tensors() for name, site in adapter.sites.items()}
    for name in TARGETS:
        a, b, scale = layer_of(theirs, name)
        assert scale == pytest.approx(4 / (2**0.5 if rs else 2))
        ours = start["peft"][name]
        same_up_to_sign(ours["A"], a)
        same_up_to_sign(ours["L"].mT, b.mT, rtol=1e-3, atol=1e-3)
        # What PEFT does otherwise than the paper: A has unit rows, L has the gradient's singular values.
        c = len(b) ** 0.25 / 3
        sigma = torch.linalg.svdvals(seen[name].gradient)[2:4]
        same_up_to_sign(start["paper"][name]["A"] / c, a)
        same_up_to_sign((start["paper"][name]["L"] * sigma).mT, b.mT, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(theirs(x), base(x), rtol=1e-4, atol=1e-4)  # both start at the base
    with torch.no_grad():
        for name in TARGETS:
            (a, b, scale), f = layer_of(theirs, name), adapter.sites[name].factors
            sign_a, sign_b = (f.A * a).sum(-1).sign(), (f.L * b).sum(0).sign()
            # PEFT's own signs, of the start too: W0 − s L₀A₀ depends on them, since a pair is not one triplet.
            for tensor, sign in ((f.A, sign_a[:, None]), (f.A0, sign_a[:, None]), (f.L, sign_b), (f.L0, sign_b)):
                tensor.mul_(sign)
            for ours, other in ((f.A, a), (f.L, b)):
                step = 0.1 * torch.randn_like(ours)
                ours.add_(step)
                other.add_(step)
    torch.testing.assert_close(theirs(x), base(x), rtol=1e-3, atol=1e-3)
