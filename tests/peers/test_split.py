"""Methods that train split factors against Hugging Face PEFT: same weights, same start, same forward.

PEFT writes the residual into the base's weight and rounds it there to float32; W' is compared as a whole.
"""

import copy

import pytest
import torch
from torch import nn

import svdpeft

peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

SHAPES = [(9, 6), (6, 9), (7, 7)]  # (in, out)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_scale = pytest.mark.parametrize(("alpha", "rs"), [(3, False), (12, False), (12, True)])


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def both(shape, method, **options):
    """One layer under both libraries: PEFT's layer, our factors, both models."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(*shape))
    config = peft.LoraConfig(target_modules=["0"], **options)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    adapter = svdpeft.attach(base, method)
    return theirs, theirs.base_model.model[0], base, adapter.sites["0"].factors


def same_forward(theirs, ours, shape):
    x = torch.randn(5, shape[0])
    close(ours(x), theirs(x))


def train(*pairs):
    """Move both sides to the same values."""
    with torch.no_grad():
        for ours, other in pairs:
            ours.add_(0.3 * torch.randn_like(ours))
            other.copy_(ours)


@every_shape
@every_scale
def test_olora(shape, alpha, rs):
    method = svdpeft.OLoRA(rank=3, alpha=alpha, rs=rs)
    theirs, layer, ours, f = both(shape, method, r=3, lora_alpha=alpha, use_rslora=rs, init_lora_weights="olora")
    left, right = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    # PEFT leaves the signs to LAPACK, here the diagonal of R is positive.
    sign = right.diagonal().sign()
    close(f.L, left * sign)
    close(f.A, right * sign[:, None])
    same_forward(theirs, ours, shape)
    # PEFT has written W0 − s L₀A₀ into the weight; here W0 is as it was.
    with ours._svdpeft.adapters["default"].disabled():
        close(layer.base_layer.weight, ours[0].weight - layer.scaling["default"] * f.L @ f.A)
    train((f.L, left), (f.A, right))
    same_forward(theirs, ours, shape)


@every_shape
@every_scale
def test_pissa(shape, alpha, rs):
    method = svdpeft.PiSSA(rank=3, alpha=alpha, rs=rs)
    theirs, layer, ours, f = both(shape, method, r=3, lora_alpha=alpha, use_rslora=rs, init_lora_weights="pissa")
    left, right = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    # PEFT divides σ by s, so that its residual is the tail of the SVD whatever α is; here σ is whole, and what is
    # subtracted is s times the head. The start of the model is the same, the factors are √s apart.
    scale = layer.scaling["default"]
    close(left.abs() * scale**0.5, f.L.abs())
    close(right.abs() * scale**0.5, f.A.abs())
    same_forward(theirs, ours, shape)
    if scale == 1:
        train((f.L, left), (f.A, right))
        same_forward(theirs, ours, shape)


@every_shape
@every_scale
def test_mica(shape, alpha, rs):
    method = svdpeft.MiCA(rank=3, alpha=alpha, rs=rs)
    theirs, layer, ours, f = both(shape, method, r=3, lora_alpha=alpha, use_rslora=rs, init_lora_weights="mica")
    left, right = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    sign = (left * f.L).sum(0).sign()
    close(f.L, left * sign)  # of the thin SVD there, too
    assert not left.requires_grad
    assert not f.L.requires_grad
    assert (right == 0).all()
    same_forward(theirs, ours, shape)
    with torch.no_grad():
        left.copy_(f.L)
    train((f.A, right))
    same_forward(theirs, ours, shape)


@every_shape
def test_kasa(shape):
    config = peft.KasaConfig(beta=0.3, gamma=0.7)
    method = svdpeft.KaSA(rank=3, alpha=12, beta=0.3, gamma=0.7)
    theirs, layer, ours, f = both(shape, method, r=3, lora_alpha=12, kasa_config=config)
    left, c, right = layer.lora_B["default"].weight, layer.lora_diag["default"], layer.lora_A["default"].weight
    assert (left == 0).all()
    assert (f.L == 0).all()
    same_forward(theirs, ours, shape)  # without the three smallest triplets
    train((f.L, left), (f.C, c), (f.A, right))
    same_forward(theirs, ours, shape)
    adapter = ours._svdpeft.adapters["default"]
    close(adapter.penalty(), theirs.base_model._get_kasa_loss())  # PEFT leaves adding it to its user
    # PEFT has lost the original weight, and refuses r = min(m, n); here one triplet stays.
    with adapter.disabled(), theirs.disable_adapter():
        x = torch.randn(5, shape[0])
        assert (ours(x) - theirs(x)).abs().max() > 1e-2
    with pytest.raises(ValueError, match="to be smaller"):
        both(shape, method, r=min(shape), lora_alpha=12, kasa_config=config)


@every_shape
@pytest.mark.parametrize("effective_rank", [None, 2, 4])
def test_osf(shape, effective_rank):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(*shape))
    config = peft.OSFConfig(target_modules=["0"], effective_rank=effective_rank)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    adapter = svdpeft.attach(base, svdpeft.OSF(rank=None if effective_rank is None else min(shape) - effective_rank))
    f, other = adapter.sites["0"].factors, theirs.base_model.model[0].osf_svd_params["default"]
    sign = (other["U_low"] * f.L).sum(0).sign()
    close(f.L, other["U_low"] * sign)
    close(f.C, other["S_low"])
    close(f.A, other["V_low"] * sign[:, None])
    same_forward(theirs, base, shape)
    with torch.no_grad():
        layer = theirs.base_model.model[0]
        for ours, name in ((f.L0, "U"), (f.C0, "S"), (f.A0, "V")):
            getattr(layer, f"_osf_{name}_low_init")["default"].copy_(ours)  # its signs are LAPACK's
    train((f.L, other["U_low"]), (f.C, other["S_low"]), (f.A, other["V_low"]))
    same_forward(theirs, base, shape)
    x = torch.randn(5, shape[0])
    for model in (theirs, base):
        model(x).pow(3).sum().backward()
    # PEFT projects in the backward pass, this between clipping and the step.
    assert (f.L.grad - other["U_low"].grad).abs().max() > 1e-3
    adapter.before_step(peak_lr=1e-3)
    close(f.L.grad, other["U_low"].grad)
    close(f.C.grad, other["S_low"].grad)
    close(f.A.grad, other["V_low"].grad)
