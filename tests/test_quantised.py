"""Every method on layers whose weights are quantised: in every state it is what it is on the dequantised weight.

So whatever the rest of the suite shows of a plain layer holds of these, too.
"""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Checks, adapt, assert_same, digest, equal_bits, perturb, refused, snapshot
from rows import EVERYTHING, defined, methods, order, rows
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from svdpeft import SORSA, LoRA, PiSSA, attach, calibrate, combine, load
from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.file import CheckpointError
from svdpeft.layers.quantised import form_of, weight
from svdpeft.layers.quantising import SCHEMES, put, scheme_named
from svdpeft.methods.base import Method

LINEAR = ("linear", 0)
FACTORED = [m for m in methods(factored=True) if defined(m, LINEAR)]
NO_PICKLE = ("torchao-int8", "torchao-int4")  # torchao's tensors cannot be
PAIRS = [(m, s) for m in FACTORED for i, s in enumerate(SCHEMES) if EVERYTHING or order("quantised", m) % 5 == i]
PAIRS += [(m, s) for m in FACTORED for s in ("nf4", "int8") if not EVERYTHING and (m, s) not in PAIRS]
every_pair = rows("method, scheme", PAIRS)
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


def bits_of(model: Net) -> tuple[bytes, bytes]:
    """Of the integers, and of what they stand for."""
    form = form_of(model.layer, "weight")
    return digest(form.codes().contiguous()), digest(form.values())


def near(found: Tensor, expected: Tensor) -> None:
    """In float32; torchao adds in another order."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every_pair
def test_adapter(method: Method, scheme: str, tmp_path: Path):
    model, plain, x = twins(scheme)
    for each in (model, plain):  # in training, where int8 of bitsandbytes multiplies by the dequantised weight
        each.norm.eval()
    before, stored, base = snapshot(model), bits_of(model), model(x)
    near(base, plain(x))
    adapter, twin = adapt(model, method), adapt(plain, method)
    for mine, its in zip(adapter.sites.values(), twin.sites.values(), strict=True):  # from the dequantised weight
        assert all(equal_bits(t, its.factors.tensors()[role]) for role, t in mine.factors.tensors().items())
    with Checks() as check:
        if adapter.sites["layer"].method.exact_start:
            with check("start"):
                assert torch.equal(model(x), base)
        for each in (adapter, twin):
            perturb(each)
        with check("output and gradients"):
            same_gradients(model, plain, adapter, twin, x)
        with check("disabled"), adapter.disabled():
            assert torch.equal(model(x), base)
        out = model(x)
        with check("ΔW"):
            near(adapter.delta("layer"), twin.delta("layer"))
        with check("not merged, not folded"):
            refused_to_write(model, adapter)
        with check("merged into a dequantised model"):
            merged(model, adapter, x, out, base, stored)
        with check("saved"):
            adapter.save(tmp_path)
            adapter.detach()
            adapter = load(model, tmp_path)
            assert torch.equal(model(x), out)
        with check("copied"):
            other, its = copy.deepcopy((model, adapter))
            assert torch.equal(other(x), out)
            its.detach()
            assert torch.equal(other(x), base)
        with check("checkpointed"):
            y = x.clone().requires_grad_()
            checkpoint(model, y, use_reentrant=False).square().sum().backward()
            assert y.grad is not None
        with check("beside another"):
            beside_another(model, adapter, x, out)
        with check("detached"):
            adapter.detach()
            assert torch.equal(model(x), base)
            assert bits_of(model) == stored
            assert_same(before, snapshot(model))


def same_gradients(model: Net, plain: Net, adapter: Adapter, twin: Adapter, x: Tensor) -> None:
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    out, expected = model(inputs[0]), plain(inputs[1])
    near(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    trained = {id(p) for p in adapter.parameters()}
    assert all((p.grad is not None) == (id(p) in trained) for p in model.parameters())
    pairs = [*zip(adapter.parameters(), twin.parameters(), strict=True), tuple(inputs)]
    for mine, its in pairs:
        assert bool((its.grad != 0).any())
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-3, atol=1e-4 * float(its.grad.abs().max()))


def refused_to_write(model: Net, adapter: Adapter) -> None:
    with refused(model, "layer cannot be merged", "quantised", "merge(dtype=torch.bfloat16)"):
        adapter.merge()
    for site in adapter.sites.values():
        if not site.method.dropout:
            with refused(model, "layer is quantised", "svdpeft.quantize"):
                adapter.fold()


def merged(model: Net, adapter: Adapter, x: Tensor, out: Tensor, base: Tensor, stored: Any) -> None:
    layer, header = form_of(model.layer, "weight").tensor, adapter.state_dict().metadata
    state = adapter.merged_state_dict(torch.float64)
    assert list(state) == ["layer.weight", "layer.bias", *list(Net().state_dict())[2:]]
    near(state["layer.weight"].float(), weight(model.layer, "weight") + adapter.delta("layer"))
    adapter.merge(dtype=torch.float32)
    near(model(x), out)
    assert adapter.state_dict().metadata == header
    with adapter.disabled():
        assert torch.equal(model(x), base)
    assert adapter.state == "merged"
    adapter.unmerge()
    assert form_of(model.layer, "weight").tensor is layer
    assert bits_of(model) == stored
    assert torch.equal(model(x), out)


def beside_another(model: Net, adapter: Adapter, x: Tensor, out: Tensor) -> None:
    two = attach(model, LoRA(rank=2), ["layer"], name="two")
    perturb(two)
    both = model(x)
    adapter.merge(dtype=torch.float32)
    two.merge()
    near(model(x), both)
    adapter.unmerge()
    near(model(x), both)
    two.unmerge()
    assert torch.equal(model(x), both)
    with two.disabled():
        assert torch.equal(model(x), out)
    two.detach()
    assert torch.equal(model(x), out)


# -- what only a quantised layer has ----------------------------------------------------------------------------------


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


def test_trained_whole_and_gradients_of_the_weight_are_refused():
    model, _, x = twins("nf4")
    with refused(model, "layer"):
        attach(model, LoRA(rank=2), ["head"], train=["layer.weight"])
    with pytest.raises(ValueError, match=r"the weight of layer is quantised \(nf4\), and integers have no gradient"):
        calibrate(model, [x], ["layer"], gradients=True, inputs=False, loss=lambda out, _: out.square().sum())
    assert calibrate(model, [x], ["layer"])["layer"].count == 10


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


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s not in NO_PICKLE])
def test_pickled(scheme: str):
    model, _, x = twins(scheme)
    model.norm.eval()
    adapter = attach(model, LoRA(rank=2), ["layer"])
    perturb(adapter)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


def test_combined_on_a_quantised_base():
    model, _, _ = twins("int8")
    model.norm.eval()
    one, two = (attach(model, LoRA(rank=2), ["layer"], name=name) for name in ("one", "two"))
    for i, each in enumerate((one, two)):
        perturb(each, seed=i)
    made = combine([(one, 0.5), (two, -1.0)]).adapter
    near(made.delta("layer"), 0.5 * one.delta("layer") - two.delta("layer"))
