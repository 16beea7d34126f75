"""Two adapters on one model: they add up, switch off alone, and leave in any order."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers import (
    Checks,
    Host,
    adapt,
    assert_same,
    back,
    close,
    differs,
    equal_bits,
    expected_of,
    frozen,
    go,
    host,
    perturb,
    snapshot,
    updated,
    weights_of,
)
from rows import EVERYTHING, Kind, every_factored, of_each_kind, one_each, order, rows, some, states
from torch import Tensor

from svdpeft import LoRA
from svdpeft.adapter.adapter import Adapter
from svdpeft.methods.base import Method, Transform
from svdpeft.registry import METHODS
from svdpeft.sites.weights import stored

LINEAR = ("linear", 0)
# Into which state, in which order, and back in which.
WRITTEN = list(itertools.product(("merge", "fold"), (0, 1), (0, 1)))
HALF = [(m, k) for m, k in of_each_kind() if m.factored and (EVERYTHING or order("two", m, k) % 2)]
LEAVE = list(itertools.product(("attached", "merge", "fold"), (0, 1)))


def pair(model: Host, method: Method) -> tuple[Adapter, Adapter]:
    """Two adapters of a model, moved off their starts; the first trains the head as well."""
    one, two = adapt(model, method, train=("head",)), adapt(model, LoRA(rank=1), name="two", seed=9)
    perturb(one)
    perturb(two, seed=8)
    return one, two


@rows("method, kind", HALF)
def test_two_adapters_add_up_switch_off_alone_and_leave(method: Method, kind: Kind):
    model, x = host(kind)
    base, before = frozen(model.layer, x), snapshot(model)
    one, two = pair(model, method)
    weights = {name: w.clone() for name, w in weights_of(model, one).items()}
    both = model.layer(x)

    def untouched() -> bool:
        return all(equal_bits(w, weights[name]) for name, w in weights_of(model, one).items())

    with Checks() as check:
        with two.disabled():
            first = model.layer(x)
        with one.disabled():
            second = model.layer(x)
        with check("each of them alone"):
            close(first.detach(), expected_of(kind, x, updated(model, one), layer=True))
            close(second.detach(), expected_of(kind, x, updated(model, two), layer=True))
            assert differs(first, base)
            assert differs(second, base)
        with check("both are the sum"):
            total = updated(model, one)
            for name, w in updated(model, two).items():
                total[name] = total[name] + (w - weights[name])
            close(both.detach(), expected_of(kind, x, total, layer=True))
        with check("neither is the base"), one.disabled(), two.disabled():
            assert torch.equal(frozen(model.layer, x), base)
        for state, order, undo in some([row for row in WRITTEN if row[0] in states(kind)], method, kind):
            with check(f"{state} in order {order}, un{state} in order {undo}"):
                for adapter in (one, two) if order else (two, one):
                    go(adapter, state)
                    close(model.layer(x), both)
                for adapter in (one, two) if undo else (two, one):
                    back(adapter, state)
                    close(model.layer(x), both)
                assert untouched()
        for one_state, two_state in itertools.permutations(states(kind), 2):
            if "attached" in (one_state, two_state):
                continue
            with check(f"{one_state} beside {two_state}"):
                go(one, one_state)
                go(two, two_state)
                close(model.layer(x), both)
                with one.disabled():
                    close(model.layer(x), second)
                with two.disabled():
                    close(model.layer(x), first)
                back(one, one_state)
                close(model.layer(x), both)
                back(two, two_state)
                assert untouched()
        for state, first_out in some([row for row in LEAVE if row[0] in states(kind)], kind, method):
            with check(f"number {first_out} leaves first, from {state}"):
                if one.state == "detached":
                    one, two = pair(model, method)
                leave(model, x, one, two, state, first_out)
                assert_same(before, snapshot(model))


def leave(model: Host, x: Tensor, one: Adapter, two: Adapter, state: str, first_out: int) -> None:
    """In either order, from any state; the one that stays owns the running statistics."""
    model.train()(x)
    model.eval()
    expected = model(x)
    for adapter in (one, two):
        go(adapter, state)
    close(model(x), expected)
    first, last = (one, two) if first_out == 0 else (two, one)
    first.detach()
    model.train()(x)
    model.eval()
    last.detach()


def test_running_statistics_return_when_the_first_of_two_adapters_leaves_first():
    model, x = host(LINEAR)
    before = snapshot(model)
    one, two = adapt(model, LoRA(rank=1)), adapt(model, LoRA(rank=1), name="two")
    model.train()(x)
    one.detach()
    model(x)
    model.eval()
    two.detach()
    assert_same(before, snapshot(model))


def test_the_one_that_stays_has_no_part_in_what_others_train_whole():
    model, _ = host(LINEAR)
    one, two = adapt(model, LoRA(rank=1), train=("head",)), adapt(model, LoRA(rank=1), name="two")
    one.detach()
    perturb(adapt(model, LoRA(rank=1), name="three", train=("head",)))
    trained = {name: p.detach().clone() for name, p in model.head.named_parameters()}
    with two.disabled():
        assert all(equal_bits(p.detach(), trained[name]) for name, p in model.head.named_parameters())


@one_each
@pytest.mark.parametrize("first", ["fold", "merge"])
@pytest.mark.parametrize("second", ["fold", "merge"])
def test_second_adapter_comes_while_the_first_is_folded_or_merged(method: Method, first: str, second: str):
    model, x = host(LINEAR)
    weight = stored(model.layer, "weight").clone()
    reference, _ = host(LINEAR)
    for name, m in (("one", method), ("two", METHODS["pissa"](rank=2))):
        perturb(adapt(reference, m, name=name))
    expected = reference.layer(x)
    one = adapt(model, method, name="one")
    perturb(one)
    getattr(one, first)()
    two = adapt(model, METHODS["pissa"](rank=2), name="two")  # decomposes the base, not what is written over it
    perturb(two)
    close(model.layer(x), expected)
    getattr(two, second)()
    close(model.layer(x), expected)
    one.detach()
    two.detach()
    assert equal_bits(stored(model.layer, "weight"), weight)


@one_each
@pytest.mark.parametrize("state", ["attached", "merge", "fold"])
def test_permanent_merge_beside_another_adapter(method: Method, state: str):
    model, x = host(LINEAR)
    one, two = adapt(model, LoRA(rank=2)), adapt(model, method, name="two")
    perturb(one)
    perturb(two)
    both = model.layer(x)
    with two.disabled():
        first = model.layer(x)
    if state != "attached":
        getattr(two, state)()
    if isinstance(method, Transform):  # its change depends on the weight below it
        with pytest.raises(ValueError, match="transforms the weight of layer"):
            one.merge(permanent=True)
        close(model.layer(x), both)
        two.merge(permanent=True) if two.state != "merged" else two.unmerge()
        close(model.layer(x), both)
        return
    one.merge(permanent=True)
    close(model.layer(x), both)
    if state != "attached":
        getattr(two, f"un{state}")()
        close(model.layer(x), both)
    two.detach()
    close(model.layer(x), first)


@every_factored
def test_second_adapter_on_a_deepcopy_shares_the_record_of_the_weight(method: Method):
    model, x = host(LINEAR)
    perturb(adapt(model, LoRA(rank=2)))
    twin = copy.deepcopy(model)
    weight = stored(twin.layer, "weight").clone()
    one = twin._svdpeft.adapters["default"]
    two = adapt(twin, method, name="two")
    perturb(two)
    expected = twin(x)
    one.merge()
    two.merge()
    one.unmerge()
    close(twin(x), expected)
    two.unmerge()
    assert equal_bits(stored(twin.layer, "weight"), weight)
