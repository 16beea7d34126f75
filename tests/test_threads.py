"""Threads and tasks that share one adapted model: what is theirs alone, what they wait for, and what is refused."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import close, differs, perturb
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torture.serving import PAIRS, Served, near, server, together

import svdpeft
from svdpeft import AdapterCallback, LoRA, Trainer, attach, using
from svdpeft.adapter import stacks, turns
from svdpeft.sites import scope


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.__name__)
def test_two_threads_beside_each_other(pair: Any):
    """``make torture`` does it for longer."""
    counts = together(0.3, *pair(Served()))
    assert set(counts) == {"right"}, counts
    assert counts["right"] > 10


def test_a_server():
    counts = server(1.0)
    assert set(counts) == {"right"}, counts
    assert counts["right"] > 50


# -- blocks are of a thread or task -----------------------------------------------------------------------------------


@contextmanager
def elsewhere(action: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """Within the block another thread does something; what came of it is there afterwards."""
    found: dict[str, Any] = {}

    def run() -> None:
        try:
            found["result"] = action()
        except Exception as error:
            found["error"] = error

    thread = threading.Thread(target=run, name="other")
    thread.start()
    try:
        yield found
    finally:
        thread.join(20)
        assert not thread.is_alive()


def result(action: Callable[[], Any]) -> Any:
    """Of an action in another thread."""
    with elsewhere(action) as found:
        pass
    if "error" in found:
        raise found["error"]
    return found["result"]


def test_a_block_is_of_its_thread_and_of_copies_of_its_context():
    served = Served()
    a, b, c = served.adapters
    with using(served.model, "b"):
        assert [each.state for each in (a, b, c)] == ["disabled", "attached", "disabled"]
        assert near(served.model(served.x), served.alone["b"])
        assert result(lambda: a.state) == "attached"
        assert near(result(lambda: served.model(served.x)), served.together)

        async def inherited() -> Tensor:
            return await asyncio.to_thread(served.model, served.x)

        assert near(asyncio.run(inherited()), served.alone["b"])
        with a.disabled(), using(served.model, "c", "a"):
            with c.disabled():
                assert near(served.model(served.x), served.alone["a"])
            assert a.state == c.state == "attached"
        assert near(served.model(served.x), served.alone["b"])
    assert near(served.model(served.x), served.together)
    with pytest.raises(ValueError, match="'d'"), using(served.model, "d"):
        raise AssertionError


def test_tasks_of_one_thread():
    served = Served()

    async def one(name: str) -> bool:
        with using(served.model, name):
            await asyncio.sleep(0)
            return near(served.model(served.x), served.alone[name])

    async def every() -> list[bool]:
        return await asyncio.gather(*(one(name) for name in "abcabc"))

    assert all(asyncio.run(every()))


def test_one_that_is_disabled_for_all_acts_where_it_is_used():
    served = Served()
    for adapter in served.adapters:
        adapter.disable()
    with using(served.model, "b"):
        assert near(served.model(served.x), served.alone["b"])
    assert near(served.model(served.x), served.alone[None])


def test_what_using_refuses():
    model = nn.Sequential(nn.Linear(4, 3))
    a, b = attach(model, LoRA(rank=1), name="a"), attach(model, LoRA(rank=1), name="b", train=["0.bias"])
    with pytest.raises(ValueError, match=r"'b' has changed 0\.bias, which is one for all threads"), using(model, "a"):
        raise AssertionError
    b.disable()
    with (
        using(model, "a"),
        pytest.raises(RuntimeError, match=r"merge\(\) of adapter 'a' is impossible in a using block"),
    ):
        a.merge()
    a.merge()
    with pytest.raises(RuntimeError, match="'a' is merged"), using(model, "a"):
        raise AssertionError


@pytest.mark.parametrize("traced", [True, False])
def test_a_compiled_model_follows_the_block_of_its_thread(traced: bool, monkeypatch: pytest.MonkeyPatch):
    """Before torch 2.14 a compiler cannot look into context variables: of one thread after the other, then."""
    if traced and not scope.TRACED:
        pytest.skip("of this torch")
    monkeypatch.setattr(scope, "TRACED", traced)
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    a, b = attach(model, LoRA(rank=2), name="a"), attach(model, LoRA(rank=2), name="b")
    perturb(a), perturb(b, seed=3)
    x = torch.randn(3, 6, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name in "abba":
        with using(model, name):
            close(compiled(x), model(x))
            if traced:
                close(result(lambda: compiled(x)), result(lambda: model(x)))
                assert differs(result(lambda: compiled(x)), model(x))
    close(compiled(x), model(x))
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of inner ones, before backward
def test_activations_that_a_thread_of_autograd_recomputes():
    """At a depth of 60 autograd goes on in a thread of its own, which has no context."""
    layer = nn.Linear(3, 3).double()
    model = nn.Sequential(layer)
    adapter = attach(model, LoRA(rank=1), ["0"])
    perturb(adapter)
    seen = set()

    def deep(x: Tensor, depth: int) -> Tensor:
        if torch._C._current_graph_task_id() != -1:
            seen.add(threading.get_ident())
        y = torch.tanh(model(x))
        return checkpoint(deep, y, depth - 1, use_reentrant=True) if depth else y  # type: ignore[return-value]

    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def plain() -> Tensor:
        y = x
        for _ in range(71):
            y = torch.tanh(model(y))
        return torch.autograd.grad(y.sum(), x)[0]

    on = plain()
    with adapter.disabled():
        expected = plain()
        checkpoint(deep, x, 70, use_reentrant=True).sum().backward()
    assert len(seen) > 1
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected, rtol=1e-9, atol=0.0)
    assert ((on - expected).abs() > 1e-3 * expected.abs()).all()


# -- changes of the model wait, or are refused ------------------------------------------------------------------------


class Slow(nn.Module):
    """Waits in the middle of a call until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.inside, self.go = threading.Event(), threading.Event()
        self.go.set()

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        self.inside.set()
        assert self.go.wait(20)
        return self.two(y)

    def twice(self, x: Tensor) -> Tensor:
        return self(self(x))


def slow() -> tuple[Slow, Any, Tensor]:
    torch.manual_seed(0)
    model = Slow().double()
    adapter = attach(model, LoRA(rank=2), ["one", "two"])
    perturb(adapter)
    x = torch.randn(2, 4, dtype=torch.float64)
    model(x)
    model.inside.clear()
    model.go.clear()
    return model, adapter, x


@pytest.mark.parametrize("method", ["__call__", "twice"])
def test_a_change_waits_for_calls_and_calls_for_it(method: str):
    model, adapter, x = slow()
    call = getattr(model, method)
    with elsewhere(lambda: call(x)) as found:
        assert model.inside.wait(20)
        with elsewhere(adapter.disable):  # in the middle of the call, of one method or the other
            time.sleep(0.05)
            assert adapter.state == "attached"
            model.go.set()
    adapter.enable()
    close(found["result"], call(x))
    assert not model._forward_pre_hooks


CALLS = [
    lambda model, x: model(x),
    lambda model, x: model.twice(x),  # whose own call is not waited for by a change that has begun
    lambda model, x: model.two(x),
    lambda model, x: model.two(model.one(x)),
]


@pytest.mark.parametrize("call", CALLS, ids=["the model", "a method", "a part", "two parts"])
def test_no_call_begins_while_the_model_changes(call: Callable[[Any, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch):
    model, adapter, x = slow()
    model.go.set()
    expected = call(model, x)
    with ExitStack() as afterwards, adapter.unwritten():
        found = afterwards.enter_context(elsewhere(lambda: call(model, x)))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.neg_()
        time.sleep(0.05)
        assert not found, "it has not waited"
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.neg_()
        assert torch.equal(call(model, x), expected)  # its own thread goes on
    assert torch.equal(found["result"], expected)
    with adapter.unwritten():
        monkeypatch.setattr(turns, "PATIENCE", 0.05)
        with pytest.raises(
            RuntimeError, match=r"a call of the \w+ has waited 0\.05 s for a change of adapter 'default'"
        ):
            result(lambda: call(model, x))
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_a_call_may_wait_for_a_part_in_a_thread_of_its_own():
    """A change waits for both; the part does not wait for the change, which would wait for it."""

    class Apart(Slow):
        def forward(self, x: Tensor) -> Tensor:
            self.inside.set()
            assert self.go.wait(20)
            return result(lambda: self.two(x))

    model = Apart()
    adapter = attach(model, LoRA(rank=2), ["two"])
    model.go.clear()
    with elsewhere(lambda: model(torch.ones(1, 4))) as found:
        assert model.inside.wait(20)
        with elsewhere(adapter.merge) as merged:
            time.sleep(0.05)
            model.go.set()
    assert "result" in found
    assert "result" in merged


@pytest.mark.parametrize("trains", [False, True])
def test_a_generator_that_is_left_while_one_looks(trains: bool, monkeypatch: pytest.MonkeyPatch):
    """It takes the stack above it out of sight, and with that the call, or the training."""
    inside, go, left, end = (threading.Event() for _ in range(4))

    @contextmanager
    def block() -> Iterator[None]:
        inside.set()
        assert go.wait(20)
        yield

    class Blocks(Slow):
        def forward(self, x: Tensor) -> Tensor:
            with block():
                left.set()
                assert end.wait(20)
            return self.one(x)

    model = Blocks()
    adapter = attach(model, LoRA(rank=2), ["one"])

    def training() -> None:
        turns.turns(model).train("default")
        with block():
            left.set()
            assert end.wait(20)

    def frames() -> dict[int, Any]:
        found.append(current() if len(found) != 1 else found[-1])  # what was before, to both who ask
        go.set()
        assert left.wait(20)
        return dict(found[-1])

    current, found = sys._current_frames, list[dict[int, Any]]()
    with elsewhere(training if trains else lambda: model(torch.ones(1, 4))):
        try:
            assert inside.wait(20)
            monkeypatch.setattr(sys, "_current_frames", frames)
            monkeypatch.setattr(turns, "PATIENCE", 0.05)
            with pytest.raises(RuntimeError, match="a training of adapter" if trains else r"for Blocks\.forward\(\)"):
                adapter.merge()
        finally:
            go.set(), end.set()


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="of Python 3.11: later ones collect between instructions")
def test_nothing_is_collected_while_one_looks():
    """A collection within ``f_back`` of a frame lets its thread run: that ended in a crash, or in what is no frame."""
    looks = {function.__code__ for function in (stacks.stack, stacks.owner, stacks._whole)}
    looking: list[bool] = []

    def collects(phase: str, info: dict[str, int]) -> None:
        looking.append(any(frame.f_code in looks for frame in stacks.stack(sys._getframe())))

    def deep(depth: int) -> None:
        deep(depth - 1) if depth else end.wait(20)

    end, before = threading.Event(), gc.get_threshold()
    gc.callbacks.append(collects)
    with elsewhere(lambda: deep(200)):
        try:
            gc.set_threshold(1)
            others = stacks.Others()
            (frames,) = (frames for frames in others.stacks().values() if len(frames) > 200)
            assert all(others.owner(frame) is None for frame in frames if frame.f_code is deep.__code__)
        finally:
            gc.set_threshold(*before)
            gc.callbacks.remove(collects)
            end.set()
    assert looking, "no collection at all"
    assert not any(looking)


def test_a_call_that_does_not_end_is_named(monkeypatch: pytest.MonkeyPatch):
    model, adapter, x = slow()
    monkeypatch.setattr(turns, "PATIENCE", 0.05)
    with elsewhere(lambda: model(x)):
        assert model.inside.wait(20)
        for change in (adapter.merge, lambda: attach(model, LoRA(rank=1), name="new"), adapter.detach):
            with pytest.raises(RuntimeError, match=r"has waited 0\.05 s for Slow\.\w+\(\) in thread 'other'"):
                change()
        model.go.set()
    adapter.merge()


def test_blocks_that_are_of_all_threads(monkeypatch: pytest.MonkeyPatch):
    """A merged adapter is off for everybody: others wait until the block ends, and say for what when it does not."""
    model, adapter, x = slow()
    model.go.set()
    adapter.merge()
    expected = model(x)
    with ExitStack() as afterwards, adapter.disabled():
        base = model(x)
        monkeypatch.setattr(turns, "PATIENCE", 0.05)
        with pytest.raises(RuntimeError, match=r"a call of the Slow has waited .* for disabled\(\) of adapter 'def"):
            result(lambda: model(x))
        with pytest.raises(RuntimeError, match=r"unmerge\(\) of .* has waited .* for disabled\(\)"):
            result(adapter.unmerge)
        monkeypatch.undo()
        found = afterwards.enter_context(elsewhere(lambda: model(x)))
        time.sleep(0.05)
        assert not found
    assert torch.equal(found["result"], expected)
    assert differs(base, expected)
    assert adapter.state == "merged"


def test_a_block_of_another_thread_keeps_the_model_as_it_is(monkeypatch: pytest.MonkeyPatch):
    model, adapter, x = slow()
    model.go.set()
    inside, go = threading.Event(), threading.Event()

    def block() -> Tensor:
        with adapter.disabled():
            inside.set()
            assert go.wait(20)
            return model(x)

    with adapter.disabled():
        base = model(x)
    with elsewhere(block) as found:
        assert inside.wait(20)
        monkeypatch.setattr(turns, "PATIENCE", 0.05)
        with pytest.raises(RuntimeError, match=r"merge\(\) .* for disabled\(\) of adapter 'default' in thread 'other'"):
            adapter.merge()
        monkeypatch.undo()
        threading.Timer(0.05, go.set).start()
        adapter.merge()  # waits for the end of the block
        assert torch.equal(found["result"], base)


def test_two_that_would_wait_for_each_other():
    """One changes the model and waits for the block of the other, who would change it, too."""
    _, adapter, _ = slow()
    inside, go = threading.Event(), threading.Event()

    def block() -> None:
        with adapter.disabled():
            inside.set()
            assert go.wait(20)
            begun = time.monotonic()
            with pytest.raises(RuntimeError, match=r"merge\(\) .* is impossible here: fold\(\) of .* waits"):
                adapter.merge()
            assert time.monotonic() - begun < 5

    with elsewhere(block) as found:
        assert inside.wait(20)
        threading.Timer(0.05, go.set).start()
        adapter.fold()
    assert "error" not in found, found


def test_a_task_that_would_wait_for_another_of_its_thread():
    _, adapter, _ = slow()

    async def block() -> None:
        with adapter.disabled():
            await asyncio.sleep(0.05)

    async def change() -> None:
        with pytest.raises(RuntimeError, match=r"merge\(\) .* is impossible beside disabled\(\) of adapter 'default'"):
            adapter.merge()

    async def both() -> None:
        await asyncio.gather(block(), change())

    asyncio.run(both())
    assert adapter.state == "attached"


class Batches(torch.utils.data.Dataset):
    """Examples, and what is done when one is asked for."""

    def __init__(self, asked: Callable[[], None]) -> None:
        self.asked = asked

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.asked()
        return {"x": torch.randn(4), "labels": torch.randn(3)}


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.fc(x) - labels).square().mean()}


@pytest.mark.parametrize("stock", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_a_training_is_not_disturbed(stock: bool, fails: bool, tmp_path: Path):
    model = Regression()
    adapter = attach(model, LoRA(rank=1), ["fc"])
    inside, go = threading.Event(), threading.Event()

    def asked() -> None:
        inside.set()
        assert go.wait(20)
        if fails:
            raise KeyError("no such example")

    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True
    )
    trainer: transformers.Trainer
    if stock:
        callbacks: list[Any] = [AdapterCallback(adapter)]
        trainer = transformers.Trainer(model, args, train_dataset=Batches(asked), callbacks=callbacks)
    else:
        collate = transformers.default_data_collator
        trainer = Trainer(model, adapter, args, train_dataset=Batches(asked), data_collator=collate)
    alive = threading.Event()

    def train() -> None:
        try:
            trainer.train()
        except KeyError:
            pass
        finally:
            inside.set()
        assert alive.wait(20)  # as a thread of a pool is, after what it did has failed

    with elsewhere(train) as found:
        assert inside.wait(20)
        assert not found
        for change in (adapter.merge, adapter.disable, lambda: attach(model, LoRA(rank=1), name="new")):
            with pytest.raises(
                RuntimeError, match="impossible beside a training of adapter 'default' in thread 'other'"
            ):
                change()
        with adapter.disabled():  # of this thread alone
            model(torch.zeros(1, 4), torch.zeros(1, 3))
        go.set()
        end = time.monotonic() + 20
        while any("train" in frame.f_code.co_name for frame in stack_of("other")) and time.monotonic() < end:
            time.sleep(0.01)
        adapter.merge()  # the training has ended, well or not
        alive.set()
    assert "error" not in found, found


def stack_of(name: str) -> Iterator[Any]:
    ident = next((thread.ident for thread in threading.enumerate() if thread.name == name), None)
    frame = sys._current_frames().get(ident) if ident is not None else None
    while frame is not None:
        if frame.f_code.co_filename != __file__:
            yield frame
        frame = frame.f_back


# -- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_made_in_a_block_is_in_none(copied: Callable[[Any], Any]):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    adapter = attach(model, LoRA(rank=2))
    perturb(adapter)
    x = torch.randn(3, 6, dtype=torch.float64)
    on = model(x)
    with adapter.disabled():
        off = model(x)
        other = copied(model)
        (its,) = svdpeft.adapters(other).values()
        assert its.state == "attached"
        assert torch.equal(other(x), on)
    assert torch.equal(other(x), on)
    with its.disabled():
        assert torch.equal(other(x), off)
    adapter.merge()
    with adapter.disabled(), pytest.raises(RuntimeError, match=r"a copy would for ever stay as .* during disabled\(\)"):
        copied(model)
    copied(model)


# -- the cost ---------------------------------------------------------------------------------------------------------


def test_nothing_is_left_in_the_model_or_in_the_thread():
    served = Served()
    before = [(dict(m._forward_pre_hooks), dict(m._forward_hooks), set(vars(m))) for m in served.model.modules()]
    with using(served.model, "a"), served.adapters[0].per_example(["a", "a", None, "a"]):
        served.model(served.x)
    with served.adapters[1].disabled():
        served.model(served.x)
    served.adapters[0].merge()
    served.adapters[0].unmerge()
    assert before == [
        (dict(m._forward_pre_hooks), dict(m._forward_hooks), set(vars(m))) for m in served.model.modules()
    ]
    assert scope.scope() is None
    its = turns.turns(served.model)
    assert not its.blocks
    assert not its.waiting
    assert not its.trainings
    assert its.owner is None
