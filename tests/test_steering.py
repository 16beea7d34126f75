"""What can be set while the model runs: AntiPaSTO's coefficient and SVDiff's strength."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapt, close, differs, equal_bits, frozen, host, perturb, refused
from rows import covering, methods
from torch import nn

from svdpeft import PSOFT, AntiPaSTO, LoRA, SVDiff, attach, load
from svdpeft.adapter.adapter import Adapter
from svdpeft.methods.base import Method

LINEAR, READ = ("linear", 0), ("rwkv", 0)
STEERED: list[tuple[Method, str]] = [
    (AntiPaSTO(rank=3), "coefficient"),
    (AntiPaSTO(rank=4, rotates="both", block=2), "coefficient"),
    (SVDiff(), "strength"),
]
every_steered = pytest.mark.parametrize(("method", "name"), STEERED, ids=str)
every_kind = pytest.mark.parametrize("kind", [LINEAR, ("conv", 0), ("experts", 0), READ], ids=str)


def steered(method: Method, kind: tuple[str, int] = LINEAR, seed: int = 7) -> tuple[nn.Module, Any, Adapter]:
    model, x = host(kind)
    adapter = adapt(model, method)
    perturb(adapter, seed=seed)
    return model, x, adapter


def value(adapter: Adapter, name: str) -> list[float]:
    return [float(getattr(site.factors, name)) for site in adapter.sites.values()]


def test_every_settable_value_is_one_frozen_number_of_the_site_that_the_method_starts_with():
    seen = set()
    for method in methods(factored=True):
        for name in method.settable:
            model, _ = host(LINEAR)
            tensor = getattr(adapt(model, method).sites["layer"].factors, name)
            assert tensor.shape == (1,)
            assert not tensor.requires_grad
            assert float(tensor) == getattr(method, name, 1.0)
            seen.add((method.name, name))
    assert {("antipasto", "coefficient"), ("svdiff", "strength")} <= seen


@every_kind
@every_steered
def test_zero_is_the_base_and_one_is_as_it_was_trained(method: Method, name: str, kind: tuple[str, int]):
    expected = frozen(*host(kind))
    model, x, adapter = steered(method, kind)
    adapted = model(x)
    assert differs(adapted, expected)
    adapter.set(**{name: 0.0})
    assert torch.equal(frozen(model, x), expected)
    assert all(bool((site.delta() == 0).all()) for site in adapter.sites.values())
    adapter.set(**{name: 1})
    assert torch.equal(model(x), adapted)


@every_kind
@every_steered
def test_a_value_that_is_set_is_the_value_of_the_method(method: Method, name: str, kind: tuple[str, int]):
    model, x, adapter = steered(method, kind)
    for number in (-1.0, 0.4):
        fresh, _ = host(kind)
        perturb(adapt(fresh, dataclasses.replace(method, **{name: number})))
        adapter.set(**{name: number})
        assert torch.equal(model(x), fresh(x))


def test_coefficients_of_opposite_sign_turn_back():
    """Without a shift of the spectrum: Rot(−α) = Rot(α)ᵀ, so the two cores are each other's turned back."""
    model, _, adapter = steered(AntiPaSTO(rank=4))
    site = adapter.sites["layer"]
    with torch.no_grad():
        site.factors.C.zero_()
    cores = {}
    for alpha in (1.0, -1.0):
        adapter.set(coefficient=alpha)
        cores[alpha] = site.method.core(site.factors) / site.factors.sigma.unsqueeze(-1)
    close((cores[1.0] @ cores[-1.0]).detach(), torch.eye(4, dtype=torch.float64))
    close(cores[1.0].mT.detach(), cores[-1.0].detach())
    assert differs(cores[1.0], cores[-1.0])
    assert isinstance(model, nn.Module)


@every_kind
@every_steered
def test_merged_and_folded_at_a_value(method: Method, name: str, kind: tuple[str, int]):
    model, x, adapter = steered(method, kind)
    adapter.set(**{name: -0.6})
    expected = model(x)
    adapter.merge()
    close(model(x), expected)
    adapter.unmerge()
    adapter.fold()
    close(model(x), expected)
    adapter.set(**{name: 0.3})
    folded = model(x)
    assert differs(folded, expected)
    adapter.unfold()
    close(model(x), folded)
    adapter.set(**{name: -0.6})
    assert torch.equal(model(x), expected)


@every_steered
def test_files_keep_the_value(method: Method, name: str, tmp_path: Path):
    model, x, adapter = steered(method)
    adapter.set(**{name: -0.6})
    expected = model(x)
    adapter.save(tmp_path / "a")
    adapter.detach()
    again = load(model, tmp_path / "a")
    assert value(again, name) == [-0.6]
    assert torch.equal(model(x), expected)
    again.set(**{name: 0.0})
    assert torch.equal(frozen(model, x), frozen(*host(LINEAR)))


@every_steered
# One weight each: compiling takes a second for each.
@pytest.mark.parametrize(("kind", "folded"), covering([LINEAR, ("raw", 1)], [False, True]), ids=str)
def test_a_compiled_model_follows(method: Method, name: str, kind: tuple[str, int], folded: bool):
    torch.compiler.reset()
    model, x, adapter = steered(method, kind)
    if folded:
        adapter.fold()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    seen = []
    close(compiled(x), model(x))
    with torch.compiler.set_stance("fail_on_recompile"):
        for number in (1.0, -1.0, 0.5, 0.0):
            adapter.set(**{name: number})
            seen.append(compiled(x))
            close(seen[-1], model(x))
    assert all(differs(a, b) for a, b in itertools.pairwise(seen))
    if not folded:
        assert torch.equal(frozen(model, x), frozen(*host(kind)))


@every_steered
def test_gradients_are_those_of_the_value(method: Method, name: str):
    """At 0 nothing that trains has an effect."""
    model, x, adapter = steered(method)
    parameters = list(adapter.parameters())
    gradients = {}
    for number in (1.0, -1.0, 0.0):
        adapter.set(**{name: number})
        gradients[number] = torch.autograd.grad(model(x).square().sum(), parameters)
    assert all(differs(a, b) for a, b in zip(gradients[1.0], gradients[-1.0], strict=True))
    assert all(bool((g == 0).all()) for g in gradients[0.0])


def test_only_the_sites_whose_method_has_the_value_are_set():
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(6, 5) for name in "abc"})
    adapter = attach(model, targets={"a": AntiPaSTO(rank=2), "b": SVDiff(), "c": LoRA(rank=2)})
    before = {name: site.factors.tensors() for name, site in copy.deepcopy(adapter.sites).items()}
    adapter.set(coefficient=-2.0, strength=0.5)
    changed = {
        f"{name}/{role}"
        for name, site in adapter.sites.items()
        for role, t in site.factors.tensors().items()
        if not equal_bits(t, before[name][role])
    }
    assert changed == {"a/coefficient", "b/strength"}
    assert float(adapter.sites["a"].factors.coefficient) == -2.0
    assert float(adapter.sites["b"].factors.strength) == 0.5


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"coeficient": 1.0}, ["coeficient", "did you mean 'coefficient'?", "strength"]),
        ({"rank": 3}, ["'rank'", "Known: coefficient, strength"]),
        ({"C": 1.0}, ["'C'", "Known"]),
        ({"coefficient": math.nan}, ["coefficient=nan", "finite"]),
        ({"coefficient": -math.inf}, ["coefficient=-inf", "finite"]),
        ({"strength": "0.5"}, ["strength='0.5'", "finite"]),
        ({"strength": None}, ["strength=None", "finite"]),
        ({"strength": True}, ["strength=True", "finite"]),
        ({"strength": torch.ones(2)}, ["strength=", "finite"]),
        ({"coefficient": 1e39}, ["coefficient=1e+39", "torch.float32", "a"]),
    ],
    ids=str,
)
def test_what_cannot_be_set_is_refused_and_nothing_is_half_set(wrong: dict[str, Any], words: list[str]):
    model = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(6, 5)})
    adapter = attach(model, targets={"a": AntiPaSTO(rank=2), "b": SVDiff()})
    good = {"strength": 0.5} if "strength" not in wrong else {"coefficient": 0.5}
    for values in (good | wrong, wrong | good):
        with refused(model, *words):
            adapter.set(**values)
    adapter.set()  # nothing is nothing


def test_a_method_without_such_values_says_so():
    model, _ = host(LINEAR)
    adapter = adapt(model, PSOFT(rank=2))
    with refused(model, "'coefficient'", "Known: none"):
        adapter.set(coefficient=1.0)


def test_states_in_which_nothing_is_set():
    model, x, adapter = steered(AntiPaSTO(rank=3))
    adapter.merge()
    with refused(model, "'default' is merged", "unmerge() it first", "merge() again", error=RuntimeError):
        adapter.set(coefficient=0.5)
    adapter.unmerge()
    with (
        adapter.disabled(),
        refused(model, "'default' is disabled", "enable() it first", error=RuntimeError),
    ):
        adapter.set(coefficient=0.5)
    assert value(adapter, "coefficient") == [1.0]
    adapter.detach()
    with refused(model, "'default' is detached", "attach or load it again", error=RuntimeError):
        adapter.set(coefficient=0.5)
    assert bool(torch.isfinite(model(x)).all())


@every_steered
def test_a_second_adapter_keeps_its_own(method: Method, name: str):
    model, x = host(LINEAR)
    one, two = adapt(model, method), adapt(model, method, name="two")
    perturb(one)
    perturb(two, seed=1)
    one.set(**{name: 0.0})
    assert value(two, name) == [1.0]
    alone = model(x)
    with one.disabled():
        assert torch.equal(model(x), alone)
