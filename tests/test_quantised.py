"""What only quantised layers have; what they have in common with all others the property tests show."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import bits, differs, perturb, refused
from torch import Tensor, nn
from torch.nn import functional as F

from svdpeft import SORSA, Full, LoRA, PiSSA, attach, calibrate, load
from svdpeft.adapter.file import CheckpointError
from svdpeft.layers.quantised import form_of, weight
from svdpeft.layers.quantising import SCHEMES, put, scheme_named

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


class Net(nn.Module):
    """A quantised layer under test, with a norm that has running statistics and a head."""

    targets = ("layer",)

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.head(torch.tanh(self.norm(y.reshape(-1, y.shape[-1]))))


def quantise(layer: nn.Module, scheme: str) -> None:
    layer.requires_grad_(False)
    put(layer, "weight", scheme_named(scheme)(layer._parameters["weight"].detach()))


def twins(scheme: str) -> tuple[Net, Net, Tensor]:
    """A quantised model, the same model with the dequantised weight, and an input of three axes."""
    torch.manual_seed(0)
    plain = Net().requires_grad_(False)
    model = copy.deepcopy(plain)
    quantise(model.layer, scheme)
    plain.layer.weight.copy_(weight(model.layer, "weight"))
    return model, plain, torch.randn(2, 5, 64)


def near(found: Tensor, expected: Tensor) -> None:
    """In float32; torchao adds in another order."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every_scheme
def test_nothing_is_written_into_integers(scheme: str):
    """They are refused by name, and a plain weight takes their place for as long as the adapter is merged."""
    model, _, x = twins(scheme)
    model.norm.eval()
    adapter = attach(model, SORSA(rank=2), ["layer"])
    perturb(adapter)
    tensor, stored, out = form_of(model.layer, "weight").tensor, bits(form_of(model.layer, "weight").codes()), model(x)
    with refused(model, "layer cannot be merged", "quantised", "merge(dtype=torch.bfloat16)"):
        adapter.merge()
    with refused(model, "layer is quantised", "svdpeft.quantize"):
        adapter.fold()
    state = adapter.merged_state_dict(torch.float64)
    assert list(state) == ["layer.weight", "layer.bias", *list(Net().state_dict())[2:]]
    near(state["layer.weight"].float(), weight(model.layer, "weight") + adapter.delta("layer"))
    header = adapter.state_dict().metadata
    adapter.merge(dtype=torch.float32)
    assert adapter.state_dict().metadata == header
    adapter.unmerge()
    assert form_of(model.layer, "weight").tensor is tensor
    assert bits(form_of(model.layer, "weight").codes()) == stored
    assert torch.equal(model(x), out)


def test_while_it_evaluates_int8_rounds_its_inputs_and_the_update_is_added_to_that():
    model, plain, x = twins("int8")
    own, exact = model.eval().layer(x), plain.eval().layer(x)
    assert differs(own, exact)
    adapters = [attach(each, PiSSA(rank=2), ["layer"]) for each in (model, plain)]
    perturb(adapters[0])
    perturb(adapters[1])
    near(model.layer(x) - own, plain.layer(x) - exact)
    with adapters[0].disabled():
        assert torch.equal(model.layer(x), own)


@every_scheme
def test_a_weight_that_is_read_is_refused(scheme: str):
    model, _, x = twins(scheme)
    adapter = attach(model, LoRA(rank=2), ["layer"])
    size = model.layer.weight.shape  # a question needs no weight
    assert len(size) == 2
    model.state_dict()
    with pytest.raises(RuntimeError, match=r"the weight of layer is quantised .* is read here, not called"):
        F.linear(x, model.layer.weight)
    adapter.detach()
    assert model.layer.weight is form_of(model.layer, "weight").tensor


@every_scheme
def test_evaluated_and_then_trained(scheme: str, tmp_path: Path):
    """bitsandbytes gives 4 bits another layout when a CPU evaluates, which passes no gradient and rounds the scales."""
    model, plain, x = twins(scheme)
    adapter = attach(model, SORSA(rank=4), ["layer"])
    adapter.save(tmp_path)
    with torch.no_grad():
        model.eval()(x)
    model.train().norm.eval()
    perturb(adapter)
    y = x.clone().requires_grad_()
    model(y).square().sum().backward()
    assert y.grad is not None
    assert bool((y.grad != 0).any())
    torch.testing.assert_close(weight(model.layer, "weight"), plain.layer.weight, rtol=1e-2, atol=1e-4)
    adapter.detach()
    assert not model._forward_pre_hooks
    load(model, tmp_path)  # by its integers it is the same base


@every_scheme
def test_another_base_is_refused(scheme: str, tmp_path: Path):
    model, plain, x = twins(scheme)
    adapter = attach(model, LoRA(rank=2), ["layer"])
    perturb(adapter)
    adapter.save(tmp_path)
    torch.manual_seed(5)
    other = Net().requires_grad_(False)
    quantise(other.layer, scheme)
    for base in (plain, other):
        with refused(base, "another base", "layer", error=CheckpointError):
            load(base, tmp_path)
    load(plain, tmp_path, check_base=False)
    near(plain.layer(x), model.layer(x))


def test_rows_of_a_batch():
    model, plain, x = twins("nf4")
    outs = []
    for each in (model, plain):
        net = nn.ModuleDict({"qkv": each.layer})
        adapter = attach(net, PiSSA(rank=2), ["qkv"])
        perturb(adapter)
        other = attach(net, LoRA(rank=2), ["qkv"], name="two")
        perturb(other)
        with adapter.per_example(["default", "two"]):
            outs.append(net["qkv"](x))
    near(*outs)


def test_parts_of_a_fused_layer():
    """A fused projection in 4 bits has the rows that it stands for, and not those of its bytes."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(64, 192).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.qkv(x)

    model = Attention()
    plain, x = copy.deepcopy(model), torch.randn(2, 5, 64)
    quantise(model.qkv, "nf4")
    with torch.no_grad():
        plain.qkv.weight.copy_(weight(model.qkv, "weight"))
    outs = []
    for each in (model, plain):
        adapter = attach(each, PiSSA(rank=2), ["qkv[q,v]"])
        assert list(adapter.sites) == ["qkv[q]", "qkv[v]"]
        perturb(adapter)
        outs.append(each(x))
    near(*outs)


@every_scheme
def test_trained_whole_and_gradients_of_the_weight_are_refused(scheme: str):
    model, _, x = twins(scheme)
    how = form_of(model.layer, "weight").scheme
    with refused(model, f"train='layer.weight': layer.weight is quantised ({how})"):
        attach(model, LoRA(rank=2), ["head"], train=["layer.weight"])
    with pytest.raises(ValueError, match=f"the weight of layer is quantised .{how}., and integers have no gradient"):
        calibrate(model, [x], ["layer"], gradients=True, inputs=False, loss=lambda out, _: out.square().sum())
    assert calibrate(model, [x], ["layer"])["layer"].count == 10
    adapter = attach(model, Full(), ["layer"])  # what can train of it
    assert set(adapter.whole) == {"layer.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_nothing_is_left_silently_of_a_partly_quantised_model():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64), nn.MultiheadAttention(64, 2))
    quantise(model[0], "torchao-int8")
    out = model[2].out_proj
    out.weight = scheme_named("torchao-int8")(out.weight.detach()).tensor
    with pytest.warns(UserWarning, match=r"2\.out_proj is not adapted: its weight is quantised \(torchao Int8Tensor\)"):
        adapter = attach(model, LoRA(rank=2))
    assert {"0", "1"} <= adapter.sites.keys()


def test_merge_says_what_its_dtype_is_for():
    model, plain, _ = twins("nf4")
    one, two = (attach(each, LoRA(rank=2), ["layer"]) for each in (model, plain))
    with refused(model, "dtype torch.int8 is none of floating point"):
        one.merge(dtype=torch.int8)
    with refused(plain, "no weight of the model is quantised"):
        two.merge(dtype=torch.float32)


def test_merged_for_good_it_is_a_plain_model():
    model, _, x = twins("nf4")
    model.norm.eval()
    adapter = attach(model, PiSSA(rank=2), ["layer"])
    perturb(adapter)
    out = model(x)
    adapter.merge(permanent=True, dtype=torch.float32)
    near(model(x), out)
    assert type(model.layer) is nn.Linear
    assert vars(model.layer).keys() == vars(nn.Linear(2, 2)).keys()


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_codes_are_what_the_values_are_looked_up_by(scheme: str):
    """In the order of the values: rows of them are left out where a part trains, and the rest tells a base."""
    form = form_of(twins(scheme)[0].layer, "weight")
    state = form.tensor.quant_state
    blocks = state.code[form.codes().int()].view(-1, state.blocksize) * state.absmax.unsqueeze(1)
    assert torch.equal(blocks.view(form.shape), form.values())
