"""One parameter in two parts of a model, each with an adapter of its own: one record of the base, and one master."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from helpers import assert_same, close, perturb, refused, snapshot
from torch import nn

from svdpeft import HeadOnly, LoRA, PiSSA, attach, load
from svdpeft.adapter.roster import adapters_in
from svdpeft.sites.weights import stored


def halves() -> nn.ModuleDict:
    """Two sub-modules with one weight; neither knows of the other."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": nn.Sequential(nn.Linear(6, 5)), "two": nn.Sequential(nn.Linear(6, 5))}).double()
    model["two"][0].weight = model["one"][0].weight
    return model


STEPS = ("one.merge", "two.merge", "one.unmerge", "two.unmerge")
LIVES = [  # nothing is unmerged before it was merged
    order
    for order in itertools.permutations(STEPS)
    if all(order.index(f"{name}.merge") < order.index(f"{name}.unmerge") for name in ("one", "two"))
]


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("order", LIVES)
def test_the_base_comes_back_whatever_the_order(order: tuple[str, ...], copied: bool):
    model = halves()
    before = snapshot(model)
    one = attach(model["one"], PiSSA(rank=2))
    if copied:  # the second adapter comes to a copy, whose parameters are new
        model = copy.deepcopy(model)
        (one,) = adapters_in(model)
    w = stored(model["one"][0], "weight").detach().clone()
    two = attach(model["two"], LoRA(rank=1))
    adapters = {"one": one, "two": two}
    for adapter in adapters.values():
        perturb(adapter)
    merged: set[str] = set()
    for step in order:
        name, change = step.split(".")
        getattr(adapters[name], change)()
        merged ^= {name}
        close(stored(model["one"][0], "weight").detach(), w + sum(adapters[n].delta("0") for n in merged))
    assert torch.equal(stored(model["two"][0], "weight"), w)
    one.detach()
    two.detach()
    if not copied:
        assert_same(before, snapshot(model))
    assert all(p.requires_grad for p in model.parameters())
    assert list(model.state_dict()) == before["keys"]


def test_detached_while_merged():
    model = halves()
    w = model["one"][0].weight.detach().clone()
    one, two = attach(model["one"], PiSSA(rank=2)), attach(model["two"], PiSSA(rank=2))
    for adapter in (one, two):
        perturb(adapter)
        adapter.merge()
    one.detach()
    close(stored(model["two"][0], "weight").detach(), w + two.delta("0"))
    two.detach()
    assert torch.equal(model["one"][0].weight, w)


def test_a_file_is_loaded_beside_a_merged_neighbour(tmp_path: Path):
    model = halves()
    two = attach(model["two"], PiSSA(rank=2))
    two.save(tmp_path)
    two.detach()
    one = attach(model["one"], PiSSA(rank=2))
    perturb(one)
    one.merge()
    load(model["two"], tmp_path)  # the base's own value is hashed, not what is written over it


@pytest.mark.parametrize("whole", ["model", "one", "two"])
@pytest.mark.parametrize("adapted", ["model", "one", "two"])
@pytest.mark.parametrize("first", ["whole", "adapted"])
def test_a_parameter_is_trained_whole_or_adapted_in_whichever_part(whole: str, adapted: str, first: str):
    model = halves()
    part = {"model": model, "one": model["one"], "two": model["two"]}
    target = {"model": "one.0", "one": "0", "two": "0"}

    def adapt() -> None:
        names = ["one.0", "two.0"] if adapted == "model" else ["0"]
        attach(part[adapted], LoRA(rank=1), targets=names, name="a")

    if first == "whole":
        attach(part[whole], HeadOnly(), train=[f"{target[whole]}.weight"], name="w")
        with refused(model, "whole"):
            adapt()
    else:
        adapt()
        with refused(model, "cannot be trained whole: another adapter adapts it"):
            attach(part[whole], HeadOnly(), train=[f"{target[whole]}.weight"], name="w")


def test_a_parameter_is_trained_whole_by_one_adapter_alone():
    model = halves()
    first = attach(model["one"], HeadOnly(), train=["0.weight"])
    with refused(model, "one.0.weight is trained whole already, as 0.weight, by an adapter that is attached to a part"):
        attach(model, HeadOnly(), train=["one.0.weight"], name="other")
    first.detach()
    attach(model, HeadOnly(), train=["one.0.weight"], name="other")


def test_what_an_adapter_of_the_whole_model_trains_goes_on_training_beside_one_of_a_part():
    model = halves()
    whole = attach(model, HeadOnly(), train=["two.0.bias"], name="whole")
    part = attach(model["two"], LoRA(rank=1))
    assert model["two"][0].bias.requires_grad
    whole.detach()
    assert not model["two"][0].bias.requires_grad, "the base of the part is frozen"
    assert model["one"][0].bias.requires_grad
    part.detach()
    assert all(p.requires_grad for p in model.parameters())
