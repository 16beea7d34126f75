"""Messages whose advice is followed: two transforms on one weight, containers, weights that come in while merged."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import close, perturb, refused
from torch import nn

from svdpeft import OFT, DoRA, FLoRA, LoRA, PiSSA, attach


def net() -> nn.ModuleDict:
    torch.manual_seed(0)
    held = {"block": nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), "mha": nn.MultiheadAttention(8, 2)}
    return nn.ModuleDict({**held, "lstm": nn.LSTM(4, 4)}).double()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("block", ["block is a Sequential, which holds block.0, block.1: name those, or all of them by"]),
        ("mha", ["mha is a MultiheadAttention, which holds mha.in_proj_weight, mha.out_proj"]),
        ("lstm", ["lstm is a LSTM, which holds lstm.weight_ih_l0, lstm.weight_hh_l0"]),
        ("blokc", ["matches no weight of the model: did you mean 'block'?"]),
    ],
)
def test_a_container_says_what_it_holds(target: str, words: list[str]):
    model = net()
    with refused(model, *words):
        attach(model, LoRA(rank=1), [target])
    if target == "block":
        assert list(attach(model, LoRA(rank=1), [r"block\..*"]).sites) == ["block.0", "block.1"]


TRANSFORMS = [DoRA(LoRA(rank=1)), OFT(2), FLoRA(rank=2)]


@pytest.mark.parametrize(("one", "two"), list(itertools.product(TRANSFORMS, TRANSFORMS)), ids=str)
def test_two_transforms_of_one_weight(one, two):
    """Both are of the same W0 and add up; neither can become the base alone, and both together can be a plain model."""
    model, x = net()["block"], torch.randn(3, 4).double()
    first, second = attach(model, one, ["0"], name="one"), attach(model, two, ["0"], name="two")
    for adapter in (first, second):
        perturb(adapter)
    expected = model(x)
    w = model[0]._parameters["weight"].detach().clone()
    close(merged(model, first, second)["0.weight"], w + first.delta("0") + second.delta("0"))
    for adapter in (first, second):
        with refused(model, "merge() both and take merged_state_dict()"):
            adapter.merge(permanent=True)
    plain = net()["block"]
    plain.load_state_dict(merged(model, first, second))
    close(plain(x), expected)
    second.detach()
    first.merge(permanent=True)


def merged(model, first, second):
    first.merge()
    second.merge()
    state = first.merged_state_dict()
    first.unmerge()
    second.unmerge()
    return state


@pytest.mark.parametrize("change", ["merge", "fold"])
def test_weights_that_come_in_while_something_is_written(change: str):
    model = net()
    other = {name: t + 1 for name, t in model.state_dict().items()}
    hooks = len(model._load_state_dict_pre_hooks)
    adapter = attach(model, PiSSA(rank=1), ["block.0"])
    perturb(adapter)
    getattr(adapter, change)()
    with refused(model, f"block.0.weight would be undone when it no longer is: un{change}() it", error=RuntimeError):
        model.load_state_dict(other, strict=False)
    model.load_state_dict({"block.1.weight": other["block.1.weight"]}, strict=False)  # nobody's
    getattr(adapter, f"un{change}")()
    model.load_state_dict(other, strict=False)
    close(model["block"][0]._parameters["weight"].detach(), other["block.0.weight"])
    adapter.merge()
    adapter.detach()
    assert len(model._load_state_dict_pre_hooks) == hooks
