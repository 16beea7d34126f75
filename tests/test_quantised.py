"""Every method on layers whose weights are quantised: in every state it is what it is on the dequantised weight.

So whatever the rest of the suite shows of a plain layer holds of these, too.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Checks, adapt, assert_same, digest, equal_bits, perturb, refused, snapshot
from rows import EVERYTHING, defined, methods, order, rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from svdpeft import LoRA, attach, load
from svdpeft.adapter.adapter import Adapter
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
