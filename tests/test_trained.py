"""A training trains exactly the adapter's parameters, with both trainers; everything else is refused by name."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from test_trainer import Bare, WithLoss, arguments, make, trainer, values
from torch import nn

import svdpeft
from svdpeft import SORSA, LoRA, PiSSA
from svdpeft.sites.weights import stored
from svdpeft.targets.wrappers import unwrapped

BOTH = pytest.mark.parametrize("stock", [False, True], ids=["own", "stock"])


def run(model, adapter, folder, stock, **options):
    """Train, with svdpeft's trainer or with a stock one and the callback."""
    import transformers

    if stock:
        callbacks = [svdpeft.AdapterCallback(adapter)]
        made = trainer(model, adapter, arguments(folder), transformers.Trainer, callbacks=callbacks, **options)
    else:
        made = trainer(model, adapter, arguments(folder), **options)
    made.train()
    return made


def pair():
    model = make(WithLoss)
    first = svdpeft.attach(model, LoRA(rank=1), ["body"], train=["norm"], name="first")
    second = svdpeft.attach(model, PiSSA(rank=2), ["body", "head"], name="second")
    return model, first, second


def test_another_adapter_of_the_model_acts_and_rests(tmp_path):
    model, first, second = pair()
    for p in first.parameters():
        with torch.no_grad():
            p.add_(0.1)
    before, flags = values(first), [p.requires_grad for p in model.parameters()]
    run(model, second, tmp_path, stock=False)
    assert all(torch.equal(p, before[name]) for name, p in first.named_parameters())
    assert all(p.grad is None for p in first.parameters()), "nothing is computed for it, and clipping does not see it"
    assert [p.requires_grad for p in model.parameters()] == flags


def test_with_a_stock_trainer_it_is_refused_by_name(tmp_path):
    model, first, second = pair()
    with pytest.raises(
        ValueError, match=r"beside those of adapter 'second', such as .* of adapter 'first'.*requires_grad of its param"
    ):
        run(model, second, tmp_path, stock=True)
    before = values(first)
    for p in first.parameters():
        p.requires_grad_(False)
    start = values(second)
    run(model, second, tmp_path, stock=True)
    assert torch.equal(model.norm.weight, before["norm.weight"])
    assert all(not torch.equal(p, start[name]) for name, p in second.named_parameters())


@BOTH
def test_a_parameter_that_was_unfrozen_afterwards_is_refused(tmp_path, stock):
    model = make(WithLoss)
    adapter = svdpeft.attach(model, LoRA(rank=1), ["body"])
    model.head.bias.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"head\.bias requires a gradient and is not of adapter 'default': .*train=\['head"
    ):
        run(model, adapter, tmp_path, stock)
    adapter.detach()
    adapter = svdpeft.attach(model, LoRA(rank=1), ["body"], train=["head.bias"])
    run(model, adapter, tmp_path, stock)


@BOTH
@pytest.mark.parametrize("other", ["a copy", "a part", "another"])
def test_an_adapter_of_another_model_is_refused(tmp_path, stock, other):
    model = make(WithLoss)
    if other == "a part":
        adapter = svdpeft.attach(model.body, LoRA(rank=1))
        words = r"norm\.weight requires a gradient"
    else:
        adapter = svdpeft.attach(model, LoRA(rank=1), ["body"])
        model = copy.deepcopy(model) if other == "a copy" else make(WithLoss)
        words = r"is not of this model: its body/L is no parameter of it"
    with pytest.raises(ValueError, match=words):
        run(model, adapter, tmp_path, stock)


def test_the_adapter_of_a_part_trains_where_the_rest_is_frozen(tmp_path):
    model = make(WithLoss)
    adapter = svdpeft.attach(model.body, LoRA(rank=1))
    for p in (*model.norm.parameters(), *model.head.parameters()):
        p.requires_grad_(False)
    start = values(adapter)
    run(model, adapter, tmp_path, stock=False)
    assert not torch.equal(values(adapter)["/L"], start["/L"])


@BOTH
def test_where_nothing_would_train_is_refused(tmp_path, stock):
    model = make(WithLoss)
    adapter = svdpeft.attach(model, SORSA(rank=1), ["body"])
    adapter.merge()
    with pytest.raises(RuntimeError, match=r"is merged, and nothing of it would train: unmerge\(\) it first"):
        run(model, adapter, tmp_path, stock)
    adapter.unmerge()
    with (
        adapter.disabled(),
        pytest.raises(RuntimeError, match=r"is disabled, and nothing of it would train: enable"),
    ):
        run(model, adapter, tmp_path, stock)
    start = values(adapter)
    run(model, adapter, tmp_path, stock)
    assert not torch.equal(values(adapter)["body/L"], start["body/L"])
    adapter.detach()
    with pytest.raises(RuntimeError, match="is detached"):
        run(model, adapter, tmp_path, stock)


def test_an_optimizer_of_something_else_is_refused(tmp_path):
    model, first, second = pair()
    for parameters, words in (
        (
            [*first.parameters(), *second.parameters()],
            r"beside those of adapter 'second', such as body/L of adapter 'first'",
        ),
        (list(second.parameters())[:1], r"the optimizer does not have body/A, which adapter 'second' trains"),
    ):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        with pytest.raises(ValueError, match=words):
            run(model, second, tmp_path, stock=False, optimizers=(optimizer, None))
    run(model, second, tmp_path, stock=False, optimizers=(torch.optim.SGD(second.parameters(), lr=0.1), None))


compiled = partial(torch.compile, backend="eager")  # the default one imports what torch 2.11 itself calls deprecated


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, lambda m: compiled(nn.DataParallel(m))])
def test_wrappers_are_seen_through(tmp_path, wrap):
    model = make(Bare)
    inner = wrap(model)
    assert unwrapped(inner) is model
    adapter = svdpeft.attach(inner, LoRA(rank=1), ["body"], train=["head"])
    assert list(adapter.sites) == ["body"]
    assert list(adapter.whole) == ["head.weight", "head.bias"]
    assert adapter.model is model
    adapter.save(tmp_path / "a")
    adapter.detach()
    adapter = svdpeft.load(wrap(make(Bare)), tmp_path / "a")
    assert stored(adapter.model.body, "weight").shape == (8, 6)
    seen = svdpeft.calibrate(inner, [torch.randn(4, 6)], ["body"])
    assert list(seen) == ["body"]
