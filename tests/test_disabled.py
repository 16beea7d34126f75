"""Losses that ask the base for a reference in the middle of a step: DPO, GRPO, KL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import close, perturb
from torch import Tensor, nn
from torch.nn import functional as F

from svdpeft import SORSA, LoRA, PiSSA, attach
from svdpeft.sites.weights import stored


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 4)]
    model = nn.Sequential(*layers).double()
    model.train()(torch.randn(16, 6).double())
    return model


class Tied(nn.Module):
    """A head that is the embedding: trained whole, it has two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))


def kl(model: nn.Module, adapter: Any, x: Tensor, reference: Tensor | None, first: bool) -> Tensor:
    """The loss, whose reference is asked for before or after the model's own forward, or is given."""
    with adapter.disabled() if reference is None else torch.no_grad():
        early = model(x).detach() if first and reference is None else reference
    own = model(x)
    if reference is None and not first:
        with adapter.disabled():
            early = model(x)
    assert early is not None
    return F.kl_div(F.log_softmax(own, -1), F.softmax(early.detach(), -1), reduction="batchmean") + own.square().mean()


OPTIONS = [{}, {"train": ["5"]}, {"train": ["1", "4", "5"]}, {"batch_norm": "frozen"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("method", [LoRA(rank=2), PiSSA(rank=2)], ids=str)
def test_the_gradients_are_those_with_a_reference_from_elsewhere(method, first, training, options):
    x = torch.randn(8, 6, dtype=torch.float64)
    found = {}
    for inside in (False, True):
        model, base = net(), net().train(training)(x).detach()
        adapter = attach(model, method, targets=["0", "3"], **options)
        perturb(adapter)
        model.train(training)
        kl(model, adapter, x, None if inside else base, first).backward()
        found[inside] = {name: p.grad.clone() for name, p in adapter.named_parameters()}
    for name, gradient in found[False].items():
        assert gradient.any()
        close(found[True][name], gradient)


def test_a_reference_with_a_graph_of_its_own():
    """Both graphs are kept, and each goes back through the tensors that it has seen."""
    model = net().eval()
    adapter = attach(model, LoRA(rank=2), targets=["0"], train=["5"])
    perturb(adapter)
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    own = model(x).square().sum()
    with adapter.disabled():
        reference = model(x).square().sum()
    (back,) = torch.autograd.grad(reference, x)
    (expected,) = torch.autograd.grad(net().eval()(x).square().sum(), x)
    close(back, expected)
    own.backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_a_tied_head_that_trains_whole_is_the_base_in_both_places():
    torch.manual_seed(0)
    model = Tied()
    ids = torch.tensor([[1, 4, 2]])
    base = model(ids).detach()
    adapter = attach(model, SORSA(rank=2), targets=["body"], train=["head"])
    perturb(adapter)
    tuned = model(ids)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with adapter.disabled():
        assert torch.equal(model(ids), base)
        assert model.head.weight is model.embed.weight
    assert all(p is parameters[n] for n, p in model.named_parameters(remove_duplicate=False)), "an optimizer has them"
    assert torch.equal(model(ids), tuned)
    tuned.sum().backward()


def test_a_model_that_moves_inside_of_the_block():
    model, x = net().eval(), torch.randn(3, 6)
    adapter = attach(model, LoRA(rank=2), targets=["0"], train=["5"])
    perturb(adapter)
    parameter = stored(model[5], "weight")
    with adapter.disabled():
        model.float()
        base = model(x)
    assert stored(model[5], "weight") is parameter
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert not torch.allclose(model(x), base)
    adapter.detach()
    torch.testing.assert_close(model(x), net().eval().float()(x))


def test_statistics_after_a_block_in_training_mode():
    """What the base sees inside of the block moves the base's statistics, and the adapter's outside of it."""
    model, x, y = net().train(), torch.randn(8, 6).double(), torch.randn(8, 6).double()
    adapter = attach(model, LoRA(rank=2), targets=["0"])
    perturb(adapter)
    twin = net().train()
    own = model[1].running_mean.clone()
    with adapter.disabled():
        model(y)
    assert torch.equal(model[1].running_mean, own)
    twin(y)
    model(x)
    assert not torch.equal(model[1].running_mean, own)
    with adapter.disabled():
        assert torch.equal(model[1].running_mean, twin[1].running_mean)
