"""The start, bit for bit, and what float32, bfloat16 and autocast make of an adapter: within one rounding."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import (
    ROUNDINGS,
    Checks,
    Host,
    adapt,
    back,
    close_to_rounding,
    dequantised,
    equal_bits,
    exact_change,
    frozen,
    go,
    host,
    magnitude,
    merge,
    perturb,
    terms,
    weight_of,
    weights_of,
    widened,
)
from rows import Kind, called, every_called_pair, every_factored_pair, every_pair, has, layer_kind, states
from torch import Tensor, nn

from svdpeft import TinyLoRA, attach
from svdpeft.adapter.adapter import Adapter
from svdpeft.methods.base import Method

HALVES = (torch.float32, torch.bfloat16)


@pytest.mark.filterwarnings("ignore:.*trains whole in torch.bfloat16")
@every_pair
def test_start_is_the_base_bit_for_bit(method: Method, kind: Kind):
    with Checks() as check:
        for dtype in (torch.float64, *HALVES) if has(kind, "float64") else HALVES:
            with check(str(dtype)):
                starts_as_the_base(method, kind, dtype)


def starts_as_the_base(method: Method, kind: Kind, dtype: torch.dtype) -> None:
    model, x = host(kind, dtype=dtype)
    expected = frozen(model, x)
    adapter = adapt(model, method)
    exact = all(site.method.exact_start for site in adapter.sites.values())
    wide = dtype == torch.float64  # elsewhere a small step off the base may be rounded away
    assert torch.equal(frozen(model, x), expected) == exact or not (exact or wide)
    for site in adapter.sites.values():
        assert bool((site.delta() == 0).all()) == exact
        if not has(kind, "read"):
            continue
        name = weight_of(model, site)
        read = operator.attrgetter(name)(model)  # what the model's own code gets
        assert torch.equal(read, weights_of(model, adapter)[name]) == exact or not (exact or wide)


@contextmanager
def written(adapter: Adapter, state: str) -> Iterator[None]:
    """Within the block the adapter is merged or folded, or as it is."""
    go(adapter, state)
    yield
    back(adapter, state)


@every_factored_pair
def test_low_precision_is_rounded_once(method: Method, kind: Kind):
    """Weights and outputs, adapted, merged and folded, against float64; ten cycles give every bit back."""
    with Checks() as check:
        for dtype in HALVES:
            model, x = host(kind, dtype=dtype)
            layer = copy.deepcopy(model.layer).double()
            adapter = adapt(model, method)
            base = {name: w.clone() for name, w in weights_of(model, adapter).items()}
            perturb(adapter)
            with check(f"weights in {dtype}"):
                weights_within_rounding(model, adapter, kind, base, dtype)
            if called(kind):
                with check(f"outputs in {dtype}"):
                    outputs_within_rounding(model, layer, kind, x, adapter, base["layer.weight"], dtype)
            with check(f"every bit returns in {dtype}"):
                for _ in range(10):
                    merge(adapter)
                    adapter.unmerge()
                assert all(equal_bits(w, base[name]) for name, w in weights_of(model, adapter).items())


def weights_within_rounding(
    model: Host, adapter: Adapter, kind: Kind, base: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """What is read and what is merged is W0 + ΔW, formed in float32 at least, to within one rounding."""
    size = {name: w.double().abs() for name, w in base.items()}
    exact = {name: w.double() for name, w in base.items()}
    for site in adapter.sites.values():
        name, module = weight_of(model, site), site.places[0].module
        size[name] += site.kind.from_matrix(module, terms(site))
        exact[name] += site.kind.from_matrix(module, exact_change(site))
    for state in states(kind):
        if state == "attached" and not has(kind, "read"):
            continue
        with written(adapter, state):
            for name, here in weights_of(model, adapter).items():
                found = operator.attrgetter(name)(model).detach()
                roundings = exact[name].abs() + (here.double().abs() if state == "fold" else 0)  # what folding wrote
                once = torch.finfo(dtype).eps / 2 * roundings
                error = (found.double() - exact[name]).abs()
                formed = ROUNDINGS * torch.finfo(torch.float32).eps * size[name]
                assert bool((error <= 1.001 * once + formed).all()), f"{name} {state} is not rounded once"


def outputs_within_rounding(
    model: Host, wide: torch.nn.Module, kind: Kind, x: Tensor, adapter: Adapter, base: Tensor, dtype: torch.dtype
) -> None:
    found, layer, site = layer_kind(kind), model.layer, adapter.sites["layer"]
    exact = found.add_bias(wide, found.run(wide, widened(x), base.double() + site.delta().double()))
    size = magnitude(found, wide, x, base, site)
    for state in states(kind):
        with written(adapter, state):
            close_to_rounding(layer(x), exact, size, dtype)


@every_called_pair
def test_autocast_keeps_the_dtype_and_the_value(method: Method, kind: Kind):
    model, x = host(kind, dtype=torch.float32)
    found, layer = layer_kind(kind), model.layer
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = layer(x)
    adapter = adapt(model, method)
    site = adapter.sites["layer"]
    if site.method.exact_start:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x), plain)
    perturb(adapter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = site._product("cpu", folded=False)
    if product is not None:  # formed in the factors' own precision: only what it does to the input is in bfloat16
        assert torch.equal(product.dense(), site.method.product(site.factors).dense())
    wide = dequantised(kind).double()
    base = weights_of(model, adapter)["layer.weight"]
    w = (base + site.delta()).double()
    exact = found.add_bias(wide.layer, found.run(wide.layer, widened(x), w))
    size = magnitude(found, wide.layer, x, base, site)
    for state in set(states(kind)) - {"merge"}:
        with written(adapter, state):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = layer(x)
            assert out.dtype == plain.dtype
            close_to_rounding(out, exact, size, torch.bfloat16)
            for p in adapter.parameters():
                p.grad = None
            out.float().square().sum().backward()
            assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


def test_autocast_rounds_the_product_and_not_what_it_is_made_of():
    """TinyLoRA's core is a sum of products: formed in float32, and rounded with the rest of the update."""
    layer, x = nn.Linear(64, 48, bias=False), torch.randn(8, 64)
    model = nn.ModuleDict({"layer": layer})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base = layer(x)
    adapter = attach(model, TinyLoRA(rank=4, u=5))
    perturb(adapter)
    site = adapter.sites["layer"]
    product = site.method.product(site.factors).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        add, what = (site.kind.add_matrix, product.dense()) if site.dense else (site.kind.add, product)
        assert torch.equal(layer(x), add(layer, x.bfloat16(), base.clone(), what))
