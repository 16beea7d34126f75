"""The invariants of an adapter in float64: every method × every layer kind, by the registries.

A row is one adapter. Each check that changes it gets a copy of it, at its start or moved off it, so that all of them
are made whatever one of them finds; the last one takes the adapter itself out of its model.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    Checks,
    Host,
    adapt,
    assert_same,
    back,
    close,
    dequantised,
    differs,
    equal_bits,
    expected_of,
    factors_of,
    frozen,
    go,
    host,
    merge,
    negligible,
    paths,
    perturb,
    refused,
    seeded,
    shared_of,
    snapshot,
    updated,
    weight_of,
    weights_of,
)
from rows import Kind, called, every_pair, has, states
from torch import Tensor

from svdpeft.adapter.adapter import Adapter
from svdpeft.compare.budget import sites_of
from svdpeft.decomposition import exact_rank, recompress
from svdpeft.interop.peft_export import export_ranks
from svdpeft.methods.base import Method
from svdpeft.sites.weights import stored


@dataclasses.dataclass
class Walk:
    """One adapter on a model of its own."""

    method: Method
    kind: Kind
    model: Host
    x: Tensor
    adapter: Adapter
    base: dict[str, Tensor]  # the adapted weights before
    plain: Tensor  # what the base gives
    values: dict[str, Tensor]  # its parameters and buffers

    @property
    def layer(self) -> Any:
        return self.model.layer

    def copied(self) -> Walk:
        model, adapter = copy.deepcopy((self.model, self.adapter))
        return dataclasses.replace(self, model=model, adapter=adapter, x=self.x.clone())

    def untouched(self) -> bool:
        """Whether every bit of the adapted weights is what it was."""
        return all(equal_bits(w, self.base[name]) for name, w in weights_of(self.model, self.adapter).items())

    def disabled(self) -> None:
        """Assert that the model without the adapter is the base to the last bit."""
        with self.adapter.disabled(), torch.no_grad():
            assert torch.equal(frozen(self.model, self.x), self.plain)
            assert all(equal_bits(self.model.state_dict()[k], v) for k, v in self.values.items())


Check = Callable[[Walk], None]
AT_START: list[Check] = []
MOVED: list[Check] = []
LOOKING: set[str] = set()  # checks that leave the adapter as it was: a copy is a quarter of a walk


def looking(check: Check) -> Check:
    """For checks that need no copy."""
    LOOKING.add(check.__name__)
    return check


def factored(check: Check) -> Check:
    """For methods that have factors."""

    @functools.wraps(check)
    def run(walk: Walk) -> None:
        if walk.method.factored:
            check(walk)

    return run


def folding(check: Check) -> Check:
    """For weights that an adapter folds into; the others refuse by name."""

    @functools.wraps(check)
    def run(walk: Walk) -> None:
        if has(walk.kind, "fold"):
            check(walk)
        else:
            with refused(walk.model, "layer is quantised", "svdpeft.quantize"):
                walk.adapter.fold()

    return run


@every_pair
def test_adapter(method: Method, kind: Kind):
    model, x = host(kind)
    before, plain = snapshot(model), frozen(model, x)
    values = {name: v.clone() for name, v in model.state_dict().items()}
    adapter = adapt(model, method, train=("head",))
    base = {name: w.clone() for name, w in weights_of(model, adapter).items()}
    walk = Walk(method, kind, model, x, adapter, base, plain, values)
    with Checks() as check:
        for made in AT_START:
            with check(made.__name__):
                made(walk if made.__name__ in LOOKING else walk.copied())
        perturb(adapter)
        for made in MOVED:
            with check(made.__name__):
                made(walk if made.__name__ in LOOKING else walk.copied())
        with check("detached_is_the_base"):
            through_all_states(walk)
            adapter.detach()
            assert_same(before, snapshot(model))
            assert torch.equal(frozen(model, x), plain)


def through_all_states(walk: Walk) -> None:
    """Trained once, merged and folded; switched off in each."""
    model, adapter, x = walk.model, walk.adapter, walk.x
    model.train()(x)  # changes the running statistics
    adapted = model.eval()(x)
    assert differs(adapted, walk.plain)
    for state in states(walk.kind):
        go(adapter, state)
        walk.disabled()
        close(model(x), adapted)
        back(adapter, state)
    assert torch.equal(model(x), adapted)


# -- at the start ---------------------------------------------------------------------------------------------


@AT_START.append
@looking
@factored
def counts_are_the_formula(walk: Walk) -> None:
    method, adapter, model = walk.method, walk.adapter, walk.model
    for site in adapter.sites.values():
        assert site.count == site.method.count(*site.shape)
    shared = {id(p): p.numel() for p in shared_of(adapter)}
    head = sum(p.numel() for p in model.head.parameters())
    assert adapter.trainable_count == sum(site.count for site in adapter.sites.values()) + sum(shared.values()) + head
    if not method.needs:  # without a calibration
        assert adapter.trainable_count == method.total(sites_of(model, method, model.targets, [])) + head
    assert adapter.trainable_count == sum(p.numel() for p in model.parameters() if p.requires_grad)


@AT_START.append
@factored
def rank_is_as_stated_before_training(walk: Walk) -> None:
    sites = walk.adapter.sites
    stated = {name: site.method.export_rank(*site.shape[1:]) for name, site in sites.items()}
    perturb(walk.adapter)
    for name, site in sites.items():
        _batch, m, n = site.shape
        if stated[name] is None:  # of full rank: no LoRA can hold it
            assert site.method.product(site.factors) is None
            with pytest.raises(ValueError, match=r"full rank|nothing to export|merge the adapter instead"):
                export_ranks(adapt(host(walk.kind)[0], walk.method))
            continue
        assert 1 <= stated[name] <= min(m, n)
        factors = copy.deepcopy(site.factors).double()
        product = site.method.as_product(factors, lambda site=site: site.base_matrix().double())
        dense = product.dense().detach()
        assert dense.shape[-2:] == (m, n)
        ranks = torch.linalg.matrix_rank(dense, rtol=1e-9)
        assert torch.equal(exact_rank(product), ranks)
        assert int(ranks.max()) <= stated[name]
        small = recompress(product)
        assert small.rank == max(int(ranks.max()), 1) <= stated[name]
        close(small.dense().detach(), dense)
        assert small.C is None
        assert small.scale == 1
        gram_left, gram_right = small.L.mT @ small.L, small.A @ small.A.mT
        close(gram_left.detach(), gram_right.detach())  # balanced: both are Σ


@AT_START.append
@looking
@factored
def same_seed_same_factors_whatever_the_random_state(walk: Walk) -> None:
    model, _ = host(walk.kind)
    seeded(1)
    state = torch.get_rng_state()
    again = factors_of(adapt(model, walk.method, train=("head",)))
    assert torch.equal(state, torch.get_rng_state())
    for name, factors in factors_of(walk.adapter).items():
        assert all(equal_bits(t, again[name][role]) for role, t in factors.items())


# -- moved off the start --------------------------------------------------------------------------------------


@MOVED.append
def gradients_reach_exactly_what_trains(walk: Walk) -> None:
    model, adapter = walk.model, walk.adapter
    trained = {id(p): name for name, p in adapter.named_parameters()}
    assert all(p.requires_grad for p in adapter.parameters())
    model.train()(walk.x).square().sum().backward()
    for name, p in model.named_parameters():
        if id(p) in trained:
            assert p.grad is not None, f"no gradient at {name}"
            assert bool((p.grad != 0).any()), f"no gradient at {name}"
        else:
            assert p.grad is None, f"a gradient at {name}"
            assert not p.requires_grad
    for name, site in adapter.sites.items():
        own = set(site.method.trains) - set(site.factors.tied)  # what is tied goes by the name of the first site
        assert {f"{name}/{role}" for role in own} <= set(trained.values())
    assert {id(p) for p in shared_of(adapter)} <= trained.keys()
    assert {"head.weight", "head.bias"} <= set(trained.values())
    assert adapter.trainable_count == sum(p.numel() for p in model.parameters() if p.requires_grad)


@MOVED.append
@factored
def merged_is_adapted_and_every_bit_returns(walk: Walk) -> None:
    layer, adapter, x = walk.layer, walk.adapter, walk.x
    adapted = layer(x)
    assert differs(adapted, expected_of(walk.kind, x, {}, layer=True))
    new = updated(walk.model, adapter)
    close(adapted.detach(), expected_of(walk.kind, x, new, layer=True))
    report = merge(adapter)
    close(layer(x), adapted)
    for name, w in weights_of(walk.model, adapter).items():
        close(w.detach(), new[name])
    assert report.worst < negligible()
    adapter.unmerge()
    for _ in range(10):
        merge(adapter)
        adapter.unmerge()
    assert walk.untouched()
    assert torch.equal(layer(x), adapted)


@MOVED.append
@factored
@folding
def folded_agrees_in_outputs_and_gradients(walk: Walk) -> None:
    model, layer, adapter, x = walk.model, walk.layer, walk.adapter, walk.x
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    inputs += [p for site in adapter.sites.values() for p in site.factors.parameters() if p.requires_grad]
    inputs = list({id(p): p for p in inputs}.values())  # what is shared, once
    out = layer(x)
    weights = torch.randn_like(out)
    expected = torch.autograd.grad((out * weights).sum(), inputs)
    adapter.fold()
    folded = layer(x)
    close(folded, out)
    for found, wanted in zip(torch.autograd.grad((folded * weights).sum(), inputs), expected, strict=True):
        close(found, wanted)
    written = {name: w.clone() for name, w in walk.base.items()}
    for site in adapter.sites.values():
        start = site.method.anchor(site.factors)
        if start is not None and not site.skips:
            written[weight_of(model, site)] -= site.kind.from_matrix(site.places[0].module, start.dense().detach())
    for name, w in weights_of(model, adapter).items():
        close(w.detach(), written[name])
    perturb(adapter, seed=11)  # training goes on while it is folded
    later = layer(x)
    assert differs(later, out)
    adapter.unfold()
    assert walk.untouched()
    close(layer(x), later)
    adapter.fold()
    adapter.merge()
    close(layer(x), later)
    adapter.unmerge()
    assert walk.untouched()


@MOVED.append
@factored
@folding
def folded_full_rank_never_reads_the_weight(walk: Walk) -> None:
    if not called(walk.kind):
        return
    layer, adapter, x = walk.layer, walk.adapter, walk.x
    site = adapter.sites["layer"]
    expected = layer(x)
    adapter.fold()
    assert site.skips == (site.method.replaces_weight(*site.shape[1:]) and site.kind.multiplies)
    if not site.skips:
        return
    weight = stored(layer, "weight").clone()
    with torch.no_grad():
        stored(layer, "weight").fill_(float("nan"))
        close(layer(x), expected)
        stored(layer, "weight").copy_(weight)
    adapter.unfold()
    assert "forward" not in vars(layer)
    close(layer(x), expected)


@MOVED.append
@factored
def three_ways_to_one_output(walk: Walk) -> None:
    """Through the factors, through a dense ΔW, and by reading W0 + ΔW."""
    if not called(walk.kind) or not has(walk.kind, "read"):
        return
    site, outputs = walk.adapter.sites["layer"], []
    for dense in paths(site):
        site.dense = dense
        outputs.append(walk.layer(walk.x))
    site.places[0].can_call = False
    close(outputs[0], outputs[-1])
    close(walk.layer(walk.x), outputs[0])


@MOVED.append
@looking
@factored
def keyword_input(walk: Walk) -> None:
    word = type(walk.layer).forward.__code__.co_varnames[1]
    expected = walk.layer(walk.x)
    for state in set(states(walk.kind)) - {"merge"}:
        go(walk.adapter, state)
        close(walk.layer(**{word: walk.x}), expected)
        back(walk.adapter, state)


@MOVED.append
@looking
@factored
def copy_is_independent(walk: Walk) -> None:
    model, adapter, x = walk.model, walk.adapter, walk.x
    for state in states(walk.kind):
        if state == "merge":
            continue
        go(adapter, state)
        adapted = model(x)
        twin, twin_adapter = copy.deepcopy((model, adapter))
        assert torch.equal(twin(x), adapted)
        perturb(twin_adapter, seed=3)
        later = twin(x)
        assert differs(later, adapted)
        assert torch.equal(model(x), adapted)
        merge(twin_adapter)
        close(twin(x), later)
        assert torch.equal(model(x), adapted)
        twin_adapter.detach()
        assert torch.equal(frozen(twin, x), walk.plain)
        assert not any(len(m._forward_hooks) for m in twin.modules())
        assert [type(m) for m in twin.modules()] == [type(m) for m in host(walk.kind)[0].modules()]
        assert torch.equal(model(x), adapted)
        back(adapter, state)


@MOVED.append
@factored
def hook_has_the_gradient_of_its_output(walk: Walk) -> None:
    """In place or not, autograd's gradients equal finite differences, in the input and in every factor."""
    if not has(walk.kind, "float64"):
        gradients_are_those_on_the_dequantised_weight(walk)
        return
    if hasattr(walk.method, "norm_gradient"):  # a paper leaves the norm's part out of the gradient: see the oracles
        for site in walk.adapter.sites.values():
            site.method = dataclasses.replace(site.method, norm_gradient=True)
    x = walk.x[:1]
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    named = [p for name, p in walk.adapter.named_parameters() if "/" in name]

    def run(*given: Tensor) -> Tensor:
        return walk.layer(given[0] if inputs else x)

    assert torch.autograd.gradcheck(run, (*inputs, *named), fast_mode=True, atol=1e-6)


def gradients_are_those_on_the_dequantised_weight(walk: Walk) -> None:
    """Where differences of 32 bits say little: the same factors on a plain weight have gradients that are checked."""
    model = dequantised(walk.kind)
    adapter = adapt(model, walk.method, train=("head",))
    perturb(adapter)
    found = []
    for each, its in ((walk.model, walk.adapter), (model, adapter)):
        x = walk.x.detach().clone().requires_grad_()
        inputs = [x, *(p for name, p in its.named_parameters() if "/" in name)]
        out = each.layer(x)
        found.append([*inputs, out, *torch.autograd.grad(out.sin().sum(), inputs)])
    mine, twins = found
    assert all(equal_bits(one, other) for one, other in zip(mine[: len(inputs)], twins[: len(inputs)], strict=True))
    for one, other in zip(mine[len(inputs) :], twins[len(inputs) :], strict=True):
        assert bool((other != 0).any())
        close(one, other)
