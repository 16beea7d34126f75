"""An adapted model in a larger program: copied, pickled, compiled, checkpointed, summarised, switched off in blocks."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers import Checks, Host, adapt, assert_same, close, differs, frozen, go, host, perturb, snapshot
from rows import (
    EVERYTHING,
    QUANTISED,
    Kind,
    every_factored,
    every_method,
    has,
    one_of_each,
    order,
    rows,
    some,
    states,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from svdpeft import SVFT, LoRA, attach, load
from svdpeft.methods.base import Method, Transform
from svdpeft.registry import METHODS

LINEAR = ("linear", 0)
READ = ("rwkv", 0)  # an example whose weights are read
THREE = [(m, k) for m in one_of_each(factored=True) for k in (LINEAR, READ, *some(QUANTISED, m))]


@every_method
def test_nested_disabled_is_still_the_base(method: Method):
    model, x = host(LINEAR)
    expected = model(x)
    adapter = adapt(model, method, train=("head",))
    perturb(adapter)
    adapted = model(x)
    with adapter.disabled():
        with adapter.disabled():
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), adapted)


def test_disabled_ends_when_the_block_raises():
    model, x = host(LINEAR)
    adapter = adapt(model, LoRA(rank=2))
    perturb(adapter)
    adapted = model(x)
    with pytest.raises(KeyError), adapter.disabled():
        raise KeyError
    assert torch.equal(model(x), adapted)


@every_factored
def test_permanent_merge_leaves_a_plain_model(method: Method):
    model, x = host(LINEAR)
    structure = snapshot(model)
    adapter = adapt(model, method)
    perturb(adapter)
    adapted = model(x)
    adapter.merge(permanent=True)
    close(model(x), adapted)
    after = snapshot(model)
    for part in (structure, after):
        part["layer"]["parameters"]["weight"] = part["layer"]["parameters"]["weight"][:2]  # all but the bits
    assert_same(structure, after)
    with pytest.raises(RuntimeError, match="detached"):
        adapter.unmerge()


@rows("method, kind, state", [(m, k, s) for m, k in THREE if has(k, "pickle") for s in some(states(k), "pickle", m, k)])
def test_pickle_and_torch_save(method: Method, kind: Kind, state: str):
    model, x = host(kind)
    expected = frozen(model, x)
    adapter = adapt(model, method, train=("head",))
    perturb(adapter)
    go(adapter, state)
    adapted = model(x)
    buffer = io.BytesIO()
    torch.save((model, adapter), buffer)
    buffer.seek(0)
    for twin, twin_adapter in (pickle.loads(pickle.dumps((model, adapter))), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), adapted)
        perturb(twin_adapter, seed=5)
        if state == "attached":
            assert differs(twin(x), adapted)
        twin_adapter.detach()
        assert torch.equal(frozen(twin, x), expected)
    assert torch.equal(model(x), adapted)


# Compiling takes a second for every site: one variant of each method, on a layer that is called or one that is read,
# and on both where it is a transform, whose two ways differ; on a quantised one those, and a part of the others.
COMPILED = [LINEAR, ("raw", 1), *([("conv", 0), READ, ("attention", 0)] if EVERYTHING else [])]
ON_INTEGERS = [m for m in one_of_each(factored=True) if EVERYTHING or isinstance(m, Transform) or order(m) % 4 == 0]


def whole(method: Method, kind: Kind) -> bool:
    """Whether the backward is traced as well, and switching off is tried: torch's part, and no method's."""
    return EVERYTHING or order("compiled", method, kind) % 4 == 0


@rows(
    "method, kind",
    [
        *((m, k) for m in one_of_each(True) for k in (COMPILED if isinstance(m, Transform) else some(COMPILED, m))),
        *((m, ("nf4", 0)) for m in ON_INTEGERS),
    ],
)
def test_compiled_equals_eager(method: Method, kind: Kind):
    """In outputs and gradients; a state that changes afterwards is seen."""
    torch.compiler.reset()
    model, x = host(kind)
    adapter = adapt(model, method)
    perturb(adapter)
    parameters = list(adapter.parameters())
    block = nn.Sequential(model.layer, nn.Tanh())
    expected = block(x)
    gradients = torch.autograd.grad(expected.square().sum(), parameters)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager" if whole(method, kind) else "eager")
    with Checks() as check:
        with check("outputs"):
            close(compiled(x), expected)
        with check("gradients"):
            found = torch.autograd.grad(compiled(x).square().sum(), parameters)
            for one, other in zip(found, gradients, strict=True):
                close(one, other)
        if whole(method, kind):
            with check("disabled"), adapter.disabled():
                assert differs(block(x), expected)
                close(compiled(x), block(x))
            with check("enabled again"):
                close(compiled(x), expected)
        with check("folded"):
            go(adapter, states(kind)[-1])
            close(compiled(x), expected)


@rows("method, kind, state", [(m, k, state) for m, k in THREE for state in states(k) if state != "merge"])
def test_gradient_checkpointing(method: Method, kind: Kind, state: str):
    model, x = host(kind)
    adapter = adapt(model, method)
    perturb(adapter)
    go(adapter, state)
    x.requires_grad_()
    inputs = list(adapter.parameters())
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in inputs]
    for p in inputs:
        p.grad = None
    with Checks() as check:
        for reentrant in some([False, True], "checkpoint", method, kind, state):
            with check(f"{reentrant=}"):
                checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
                for p, wanted in zip(inputs, expected, strict=True):
                    close(p.grad, wanted)
            for p in inputs:
                p.grad = None


@every_factored
def test_summary_and_repr(method: Method):
    model, _ = host(LINEAR)
    adapter = adapt(model, method, train=("head.bias",))
    text = adapter.summary()
    site = adapter.sites["layer"]
    assert str(site.method) in text
    assert "5x7" in text
    assert "linear" in text
    assert f"{adapter.trainable_count:,}" in text
    assert "head.bias" in text
    assert "head: not in targets" in text
    base = sum(v.numel() for k, v in host(LINEAR)[0].named_parameters())
    assert f"{adapter.trainable_count / base:.3%} of {base:,}" in text
    adapter.fold()
    assert ("from factors alone" in adapter.summary()) == site.skips
    assert "folded" in repr(adapter)


def test_summary_of_a_second_adapter_does_not_name_the_first_ones_factors():
    model, _ = host(LINEAR)
    first = adapt(model, LoRA(rank=2))
    second = adapt(model, LoRA(rank=2), name="two")
    assert dict(second.skipped) == dict(first.skipped) == {"head": "not in targets"}
    assert "svdpeft" not in second.summary()


def test_summary_joins_repeated_blocks():
    model = nn.ModuleDict(
        {"blocks": nn.Sequential(*(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6)) for _ in range(3)))}
    )
    text = attach(model, LoRA(rank=2)).summary()
    assert "×3" in text
    assert text.count("6x4") == 1


@every_factored
def test_methods_survive_json(method: Method):
    fields = json.loads(json.dumps(method.to_json()))
    again = METHODS[fields.pop("name")](**fields)
    assert again == method


def test_head_of_a_host_is_untouched_by_a_site_beside_it():
    model, _x = host(LINEAR)
    adapter = adapt(model, SVFT())
    perturb(adapter)
    assert isinstance(model, Host)
    assert list(adapter.sites) == ["layer"]
    assert not model.head.weight.requires_grad
    adapter.detach()
    assert model.head.weight.requires_grad


def test_load_gives_the_methods_of_attach(tmp_path: Path):
    model, x = host(LINEAR)
    adapter = adapt(model, METHODS["sorsa"](rank={"layer": 2, ".*": 1}))
    perturb(adapter)
    expected = model(x)
    adapter.save(tmp_path / "a")
    adapter.detach()
    again = load(model, tmp_path / "a", name="again")
    assert again.name == "again"
    assert torch.equal(model(x), expected)
    assert again.methods == adapter.methods
