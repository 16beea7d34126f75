"""A method whose own step is left out of a training would be another method: one guard for all that have one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import adapt
from rows import methods
from torch import nn

from svdpeft import OFT, OSF, SORSA, LoRA, attach
from svdpeft.methods.base import Factors, Progress
from svdpeft.registry import METHODS

FACTORED = methods(factored=True)
LEFT_OUT = "has not done its own step: call adapter.before_step"


def net() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double().train(), torch.randn(5, 6).double()


def step(model: Any, adapter: Any, x: Any, optimizer: Any) -> None:
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("method", FACTORED, ids=str)
def test_a_plain_loop_is_the_method_or_is_refused(method: Any):
    model, x = net()
    adapter = adapt(model, method, targets=["0", "2"])
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-3)
    step(model, adapter, x, optimizer)
    if method.has_step:
        with pytest.raises(RuntimeError, match=LEFT_OUT):
            model(x)
        model.eval()(x)
        with torch.no_grad():
            model.train()(x)
    else:
        step(model, adapter, x, optimizer)


@pytest.mark.parametrize("method", FACTORED, ids=str)
def test_who_says_that_there_is_no_step_has_none(method: Any):
    """What the two functions change is nothing, for whoever says that they need not be called."""
    model, x = net()
    adapter = adapt(model, method, targets=["0", "2"])
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p))  # far from every constraint
    model(x).square().mean().backward()
    before = {n: (p.detach().clone(), p.grad.clone()) for n, p in adapter.named_parameters() if p.grad is not None}
    for site in adapter.sites.values():
        site.method.before_step([site.factors], Progress(3, 10, peak_lr=0.1))
        site.method.after_step([site.factors], Progress(3, 10, lr_scale=1.0))
    changed = [
        n
        for n, p in adapter.named_parameters()
        if n in before and not (torch.equal(p, before[n][0]) and torch.equal(p.grad, before[n][1]))
    ]
    assert method.has_step or not changed


@pytest.mark.parametrize(
    "method", [SORSA(rank=2), SORSA(rank=2, mode="gradient"), OSF(rank=2), OFT(2, eps=0.1)], ids=str
)
def test_the_loop_of_the_documentation_is_let_through(method: Any):
    model, x = net()
    adapter = attach(model, method, ["0", "2"])
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    for _ in range(3):
        for _ in range(2):  # gradients are accumulated
            model(x).square().mean().backward()
        adapter.before_step(1e-3)
        optimizer.step()
        adapter.after_step()
        optimizer.zero_grad()


def test_edits_by_hand_and_several_forwards_are_no_steps():
    """SAM climbs before it descends, and LBFGS looks several times: none of it is a step of an optimizer."""
    model, x = net()
    adapter = attach(model, SORSA(rank=2), ["0", "2"])
    with torch.no_grad():
        for p in adapter.parameters():
            p.mul_(1.01)
    model(x)
    optimizer = torch.optim.LBFGS(adapter.parameters(), max_iter=4)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(RuntimeError, match=LEFT_OUT):
        model(x)


def test_a_method_of_somebody_else_says_it_too():
    class Shrinks(LoRA):
        def after_step(self, sites: list[Factors], progress: Progress) -> None:
            for f in sites:
                f.L.data.mul_(0.9)

    model, x = net()
    adapter = attach(model, Shrinks(rank=1), ["0"])
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    step(model, adapter, x, optimizer)
    with pytest.raises(RuntimeError, match=LEFT_OUT):
        model(x)
    assert "lora" in METHODS
