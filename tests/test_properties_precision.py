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
from rows import Kind, called, has, layer_kind, of_each, states
from torch import Tensor, nn

from svdpeft import TinyLoRA, attach
from svdpeft.adapter.adapter import Adapter
from svdpeft.methods.base import Method

HALVES = (torch.float32, torch.bfloat16)


@pytest.mark.filterwarnings("ignore:.*trains whole in torch.bfloat16")
@of_each
def test_in_every_dtype(method: Method, kind: Kind):
    """At the start the base, bit for bit; moved, and merged and folded, rounded once; autocast; every bit returns."""
    with Checks() as check:
        for dtype in (torch.float64, *HALVES) if has(kind, "float64") else HALVES:
            model, x = host(kind, dtype=dtype)
            expected, wide = frozen(model, x), copy.deepcopy(model.layer).double()
            plain = under_autocast(model.layer, x) if dtype == torch.float32 else None
            adapter = adapt(model, method)
            base = {name: w.clone() for name, w in weights_of(model, adapter).items()}
            with check(f"starts as the base in {dtype}"):
                starts_as_the_base(model, adapter, kind, x, expected)
            if not method.factored or dtype == torch.float64:
                continue
            if called(kind) and plain is not None:
                with check("starts as the base under autocast"):
                    out = under_autocast(model.layer, x)
                    assert torch.equal(out, plain) or not adapter.sites["layer"].method.exact_start
            perturb(adapter)
            with check(f"weights in {dtype}"):
                weights_within_rounding(model, adapter, kind, base, dtype)
            if called(kind):
                with check(f"outputs in {dtype}"):
                    outputs_within_rounding(model, wide, kind, x, adapter, base["layer.weight"], dtype)
            if called(kind) and plain is not None:
                with check("autocast keeps the dtype and the value"):
                    autocast_keeps_the_dtype_and_the_value(model, kind, x, adapter, base["layer.weight"], plain)
            with check(f"every bit returns in {dtype}"):
                for _ in range(3):  # ten in float64: test_properties_walk.py
                    merge(adapter)
                    adapter.unmerge()
                assert all(equal_bits(w, base[name]) for name, w in weights_of(model, adapter).items())


def starts_as_the_base(model: Host, adapter: Adapter, kind: Kind, x: Tensor, expected: Tensor) -> None:
    exact = all(site.method.exact_start for site in adapter.sites.values())
    wide = expected.dtype == torch.float64  # elsewhere a small step off the base may be rounded away
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


def under_autocast(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return layer(x)


def autocast_keeps_the_dtype_and_the_value(
    model: Host, kind: Kind, x: Tensor, adapter: Adapter, base: Tensor, plain: Tensor
) -> None:
    found, layer, site = layer_kind(kind), model.layer, adapter.sites["layer"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = site._product("cpu", folded=False)
    if product is not None:  # formed in the factors' own precision: only what it does to the input is in bfloat16
        assert torch.equal(product.dense(), site.method.product(site.factors).dense())
    wide = dequantised(kind).double()
    w = (base + site.delta()).double()
    exact = found.add_bias(wide.layer, found.run(wide.layer, widened(x), w))
    size = magnitude(found, wide.layer, x, base, site)
    for state in set(states(kind)) - {"merge"}:
        with written(adapter, state):
            out = under_autocast(layer, x)
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
