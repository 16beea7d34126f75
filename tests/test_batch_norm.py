"""The policies for normalisation layers with running statistics."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import adapt, assert_same, equal_bits, host, perturb, snapshot

from svdpeft import LoRA, PiSSA, attach, load

LINEAR = ("linear", 0)


def test_train_is_the_default_and_what_changes_is_saved(tmp_path: Any):
    model, x = host(LINEAR)
    before = model.norm.running_mean.clone()
    adapter = adapt(model, PiSSA(rank=2))
    perturb(adapter)
    model.train()(x)
    assert not torch.equal(model.norm.running_mean, before)
    expected = model.eval()(x)
    adapter.save(tmp_path / "a")
    again, _ = host(LINEAR)
    assert load(again, tmp_path / "a").batch_norm == "train"
    assert torch.equal(again(x), expected)


def test_frozen_statistics_stay_and_the_batch_does_not_matter(tmp_path: Any):
    model, x = host(LINEAR)
    before = snapshot(model)
    adapter = adapt(model, PiSSA(rank=2), batch_norm="frozen")
    perturb(adapter)
    expected = model.eval()(x)
    model.train()
    assert model.training
    assert model.layer.training
    assert not model.norm.training
    out = model(x)
    assert torch.equal(out, expected), "in training mode as in evaluation mode"
    assert torch.equal(model(x[:1]), model.eval()(x[:1]))
    assert int(model.norm.num_batches_tracked) == 0
    adapter.save(tmp_path / "a")
    again, _ = host(LINEAR)
    loaded = load(again, tmp_path / "a")
    assert loaded.batch_norm == "frozen"
    assert torch.equal(again.train()(x), expected)
    adapter.detach()
    model.eval()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("mode", [True, False])
def test_the_base_gets_the_mode_back_that_was_asked_for(mode: bool):
    model, x = host(LINEAR)
    model.train()
    adapter = adapt(model, LoRA(rank=2), batch_norm="frozen")
    model.train(mode)
    with adapter.disabled():
        assert model.norm.training == mode, "the base, as if the adapter were not there"
        model(x)
        assert int(model.norm.num_batches_tracked) == int(mode)
    assert not model.norm.training
    assert int(model.norm.num_batches_tracked) == 0
    adapter.detach()
    assert model.norm.training == mode
    assert "train" not in vars(model.norm)


def test_one_of_two_adapters_freezes():
    model, x = host(LINEAR)
    model.train()
    adapt(model, LoRA(rank=2))
    two = adapt(model, LoRA(rank=2), name="two", batch_norm="frozen")
    three = adapt(model, LoRA(rank=2), name="three", batch_norm="frozen")
    model(x)
    assert int(model.norm.num_batches_tracked) == 0
    with two.disabled():
        assert not model.norm.training
    two.detach()
    assert not model.norm.training, "the third holds them still"
    three.detach()
    assert model.norm.training


def test_frozen_models_are_copied_and_pickled():
    model, x = host(LINEAR)
    adapter = adapt(model, PiSSA(rank=2), batch_norm="frozen")
    perturb(adapter)
    expected = model.eval()(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.train()(x), expected)
        assert not twin.norm.training
        twin._svdpeft.adapters["default"].detach()
        assert twin.norm.training
    assert not model.norm.training
    assert equal_bits(model.norm.running_mean, torch.zeros_like(model.norm.running_mean))


def test_an_unknown_policy():
    model, _ = host(LINEAR)
    with pytest.raises(ValueError, match="batch_norm 'eval' is neither 'train' nor 'frozen'"):
        attach(model, LoRA(rank=2), batch_norm="eval")  # type: ignore[arg-type]
