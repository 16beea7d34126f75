"""Several adapters on one base: each with its own head, biases and statistics, and any of them on or off."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import perturb
from torch import Tensor, nn

import svdpeft
from svdpeft import LoRA, PiSSA, attach, load

BODY = [r"body\..*"]
TASKS = ("digits", "letters", "sums")


class Net(nn.Module):
    """A body with a normalisation and a dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def trained(model: nn.Module, name: str, seed: int) -> Any:
    """An adapter that has seen a few steps of its own: factors, head and statistics have moved."""
    adapter = attach(model, LoRA(rank=2), BODY, train=["head"], name=name)
    with svdpeft.only(model, name):
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.3)
        g = torch.Generator().manual_seed(seed)
        model.train()
        for _ in range(3):
            x, y = torch.randn(16, 6, generator=g) * (1 + seed), torch.randint(3, (16,), generator=g)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
    return adapter


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(9))


def test_three_tasks_on_one_base_are_what_each_is_alone(x: Tensor, tmp_path: Path):
    base = net()
    alone, plain = {}, base(x)
    for seed, name in enumerate(TASKS):
        model = net()
        trained(model, name, seed).save(tmp_path / name)
        alone[name] = model(x).detach()

    together = net()
    for seed, name in enumerate(TASKS):
        trained(together, name, seed)
        svdpeft.only(together)  # so that the next one starts from the base
    served = net()
    for name in TASKS:
        load(served, tmp_path / name, enabled=False)
    for model in (together, served, copy.deepcopy(served), pickle.loads(pickle.dumps(served))):
        for name in (*TASKS, *reversed(TASKS)):
            svdpeft.only(model, name)
            assert torch.equal(model(x), alone[name]), name
            adapter = svdpeft.adapters(model)[name]
            adapter.merge()
            torch.testing.assert_close(model(x), alone[name])
            adapter.unmerge()
        svdpeft.only(model)
        assert torch.equal(model(x), plain)
        for adapter in list(svdpeft.adapters(model).values()):
            adapter.detach()
        assert torch.equal(model(x), plain)
        assert {n: t.tolist() for n, t in model.state_dict().items()} == {
            n: t.tolist() for n, t in net().state_dict().items()
        }


def test_a_file_does_not_depend_on_who_is_on(tmp_path: Path):
    model = net()
    for seed, name in enumerate(TASKS):
        trained(model, name, seed)
    for i, on in enumerate([(), TASKS, ("letters",), ("sums", "digits")]):
        with svdpeft.only(model, *on):
            for name in TASKS:
                svdpeft.adapters(model)[name].save(tmp_path / name / str(i))
    for name in TASKS:
        files = [(tmp_path / name / str(i) / "adapter.safetensors").read_bytes() for i in range(4)]
        assert len(set(files)) == 1


def test_the_last_of_those_that_are_on_shows_its_head(x: Tensor):
    model = net()
    first, second = trained(model, "first", 0), trained(model, "second", 1)
    heads = {a.name: a.own["head.weight"].clone() for a in (first, second)}
    base = net().head.weight
    assert torch.equal(model.head.weight, heads["second"])
    assert second.own.covered() == {}
    assert first.own.covered()["head.weight"] == "second"
    second.disable()
    assert torch.equal(model.head.weight, heads["first"])
    first.disable()
    assert torch.equal(model.head.weight, base)
    second.enable()
    first.enable()  # attached earlier: the later one still covers it
    assert torch.equal(model.head.weight, heads["second"])
    second.detach()
    assert torch.equal(model.head.weight, heads["first"])
    first.detach()
    assert torch.equal(model.head.weight, base)


@pytest.mark.parametrize("order", [0, 1])
def test_the_parameter_of_before_is_there_again_at_the_end(order: int):
    model = net()
    weight, value = model.head.weight, model.head.weight.detach().clone()
    pair = [trained(model, "first", 0), trained(model, "second", 1)]
    for adapter in pair if order else reversed(pair):
        adapter.detach()
    assert model.head.weight is weight
    assert torch.equal(weight, value)
    assert weight.requires_grad


def test_attached_on_top_of_another_nothing_changes(x: Tensor):
    model = net()
    trained(model, "first", 0)
    before = model(x)
    second = attach(model, LoRA(rank=1), BODY, train=["head"], name="second")
    assert torch.equal(model(x), before)
    with torch.no_grad():
        second.own["head.bias"].add_(1)
    assert not torch.equal(model(x), before)
    second.detach()
    assert torch.equal(model(x), before)


def test_merged_for_good_the_head_is_the_models(x: Tensor):
    model = net()
    first, second = trained(model, "first", 0), trained(model, "second", 1)
    second.disable()
    out = model(x)
    first.merge(permanent=True)
    torch.testing.assert_close(model(x), out)
    second.enable()
    second.detach()
    torch.testing.assert_close(model(x), out)
    assert not svdpeft.adapters(model)


def test_only_what_is_on_and_own_gets_a_gradient():
    model = net().train()
    first, second = trained(model, "first", 0), trained(model, "second", 1)
    model.train()
    with svdpeft.only(model, "first"):
        model(torch.randn(4, 6)).sum().backward()
    assert all(p.grad is not None for p in first.parameters())
    assert all(p.grad is None for p in second.parameters())
    svdpeft.only(model)
    model(torch.randn(4, 6, requires_grad=True)).sum().backward()
    assert model.head.weight.grad is None  # the base's
    assert not model.head.weight.requires_grad


def test_training_one_whose_head_is_covered_is_refused():
    from svdpeft.training.trained import check_trains

    model = net()
    first, _ = trained(model, "first", 0), trained(model, "second", 1)
    with pytest.raises(ValueError, match=r"head.* of adapter 'first' is covered by that of adapter 'second'.*only\("):
        check_trains(first, model)
    with svdpeft.only(model, "first"):
        check_trains(first, model)


def test_moved_to_another_precision_while_it_is_away(x: Tensor):
    model = net()
    trained(model, "first", 0)
    trained(model, "second", 1)
    svdpeft.only(model, "first")
    expected = model(x)
    svdpeft.only(model, "second")
    model.double()
    svdpeft.only(model, "first")
    assert {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()} == {torch.float64}
    torch.testing.assert_close(model(x.double()), expected.double(), atol=1e-5, rtol=1e-5)


def test_a_tied_head_is_exchanged_wherever_it_is():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    for i, name in enumerate("ab"):
        adapter = attach(model, LoRA(rank=1), ["body"], train=["embed"], name=name)
        with torch.no_grad():
            adapter.own["embed.weight"].fill_(i)
    for name, value in (("a", 0), ("b", 1)):
        svdpeft.only(model, name)
        assert model["head"].weight is model["embed"].weight
        assert bool((model["head"].weight == value).all())


def test_a_recurrent_layer_that_trains_whole():
    """It computes with a list of its own, which has to know the other version."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 3, batch_first=True), "out": nn.Linear(3, 2)})
    x = torch.randn(2, 5, 4)
    base = model["rnn"](x)[0]
    adapter = attach(model, LoRA(rank=1), ["out"], train=["rnn"])
    with torch.no_grad():
        for name in adapter.whole:
            adapter.own[name].add_(0.1)
    moved = model["rnn"](x)[0]
    assert not torch.equal(moved, base)
    with adapter.disabled():
        assert torch.equal(model["rnn"](x)[0], base)
    assert torch.equal(model["rnn"](x)[0], moved)


def test_a_block_leaves_what_was_on_and_merged():
    model = net()
    first, second = (attach(model, PiSSA(rank=1), BODY, name=name) for name in ("first", "second"))
    perturb(first)
    first.merge()
    weight = model.body[0].weight.detach().clone()
    second.disable()
    with svdpeft.only(model, "second"):
        assert (first.state, second.state) == ("disabled", "attached")
    assert (first.state, second.state) == ("merged", "disabled")
    assert torch.equal(model.body[0].weight, weight)
    with pytest.raises(ValueError, match="no adapter of this model is called 'secnd': did you mean 'second'"):
        svdpeft.only(model, "secnd")
    assert (first.state, second.state) == ("merged", "disabled")
    with second.disabled():  # it was off before the block
        pass
    assert second.state == "disabled"


def test_adapters_of_parts_and_of_wrapped_models():
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(3, 3)), "head": nn.Linear(3, 2)})
    whole = attach(model, LoRA(rank=1), ["head"])
    part = attach(model["encoder"], LoRA(rank=1), name="own")
    assert svdpeft.adapters(torch.compile(model, backend="eager")) == {"default": whole, "encoder.own": part}
    svdpeft.only(model, "encoder.own")
    assert (whole.state, part.state) == ("disabled", "attached")


def test_the_averaged_copy_of_a_model_has_its_adapter():
    """``torch.optim.swa_utils.AveragedModel`` and timm's ``ModelEmaV3`` keep a deep copy in ``module``."""
    model = net()
    adapter = attach(model, LoRA(rank=1), BODY, train=["head"])
    averaged = torch.optim.swa_utils.AveragedModel(model)
    perturb(adapter)
    averaged.update_parameters(model)
    copied = svdpeft.adapters(averaged.module)["default"]
    assert copied is not adapter
    assert copied.trainable_count == adapter.trainable_count


def test_biases_of_the_adapted_layers():
    model = net()
    adapter = attach(model, LoRA(rank=1), ["body.0"], bias=True)
    assert list(adapter.whole) == ["body.0.bias"]
    assert adapter.trainable_count == 6 + 8 + 8
    with pytest.raises(ValueError, match="bias=True: none of the adapted layers has a bias"):
        attach(nn.Linear(3, 2, bias=False), LoRA(rank=1), bias=True)


def test_what_cannot_be_merged_stays_off(x: Tensor):
    model = net()
    base = model(x)
    adapter = attach(model, LoRA(rank=1), BODY, train=["head"])
    with torch.no_grad():
        adapter.sites["body.0"].factors.L.fill_(float("nan"))
    adapter.disable()
    with pytest.raises(ValueError, match=r"body\.0 cannot be merged"):
        adapter.merge()
    assert adapter.state == "disabled"
    assert torch.equal(model(x), base)


def with_statistics(name: str, changed: bool) -> Any:
    """The state of an adapter, and what the model gives with it."""
    model = net()
    adapter = attach(model, LoRA(rank=1), BODY, name=name)
    perturb(adapter)
    if changed:
        model.train()(3 + torch.randn(32, 6, generator=torch.Generator().manual_seed(5)))
        model.eval()
    return adapter.state_dict(), model


def test_statistics_that_a_file_does_not_have_are_the_bases(x: Tensor):
    """And not those of an adapter that is on while it is loaded, combined or swapped in."""
    (changed, _), (plain, alone) = with_statistics("a", True), with_statistics("b", False)
    for enabled in (True, False):
        model = net()
        load(model, changed)
        load(model, plain, enabled=enabled)
        svdpeft.only(model, "b")
        assert torch.equal(model(x), alone(x))
    model = net()
    first, slot = load(model, changed), attach(model, LoRA(rank=2), BODY, name="slot")
    slot.load_state_dict(plain)
    svdpeft.only(model, "slot")
    torch.testing.assert_close(model(x), alone(x))
    first.enable()
    svdpeft.combine([(slot, 1.0)])
    svdpeft.only(model, "combined")
    torch.testing.assert_close(model(x), alone(x))


def test_statistics_of_a_part_and_of_the_whole(x: Tensor):
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    part = attach(model.body, LoRA(rank=1), ["0"], name="part")
    model.train()(3 * x)
    whole = attach(model, LoRA(rank=1), ["head"], name="whole")
    model(7 * x)
    model.eval()
    out = model(x)
    with svdpeft.only(model):
        pass
    assert torch.equal(model(x), out)
    part.detach()
    whole.detach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("last", ["detach", "permanent"])
def test_the_parameter_of_before_whoever_had_it_first(last: str):
    model = net()
    weight = model.head.weight
    first, second = (attach(model, LoRA(rank=1), BODY, train=["head"], name=name) for name in "ab")
    first.detach()
    if last == "permanent":
        perturb(second)
        value = second.own["head.weight"].detach().clone()
        second.merge(permanent=True)
        assert torch.equal(model.head.weight, value)
    else:
        first = attach(model, LoRA(rank=1), BODY, train=["head"], name="a")
        first.detach()
        second.detach()
    assert model.head.weight is weight
    assert weight.requires_grad


def test_a_base_that_is_shown_does_not_train():
    model = net()
    a, b, c = (attach(model, LoRA(rank=1), BODY, train=["head"] * (n < "c"), name=n) for n in "abc")
    a.detach()
    b.disable()
    assert not model.head.weight.requires_grad
    assert all(p.requires_grad for p in c.parameters())


def test_nothing_is_enabled_in_a_block_that_names_rows(x: Tensor):
    model = net()
    a, b = (attach(model, LoRA(rank=1), BODY, name=name, batch_norm="frozen") for name in "ab")
    b.disable()
    for call in (b.enable, b.merge):
        with (
            a.per_example([None] * 5),
            pytest.raises(RuntimeError, match="of adapter 'b' is impossible in a per_"),
        ):
            call()
    assert b.state == "disabled"


def test_a_head_that_was_replaced_is_not_saved():
    model = net()
    adapter = attach(model, LoRA(rank=1), BODY, train=["head"])
    model.head = nn.Linear(8, 2)
    with pytest.raises(RuntimeError, match=r"head\.\w+: its layer is no longer in the model"):
        adapter.state_dict()


def test_statistics_that_an_adapter_of_a_part_has_are_refused_before_anything_is_attached():
    changed, _ = with_statistics("a", True)
    model = net()
    part = attach(model.body, LoRA(rank=1), ["0"], name="part")
    with pytest.raises(svdpeft.CheckpointError, match=r"body\.1\.\w+ is among the values, and an adapter"):
        load(model, changed)
    assert svdpeft.adapters(model) == {"body.part": part}
