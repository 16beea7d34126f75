"""Rank allocation in trainings: driven by the Trainer and the callback, resumed, and never left out in silence."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import transformers
from test_trainer import WithLoss, arguments, make, trainer, values
from torch import nn
from torch.utils.checkpoint import checkpoint

import svdpeft
from svdpeft import SORSA, AdaLoRA, Budget, CheckpointError, LoRA, PiSSA, attach
from svdpeft.adapter.loading import restore
from svdpeft.training.resume import FILE, load_training_state, save_training_state

LEFT_OUT = "has not done its own step"
METHODS = [
    AdaLoRA(rank=4, gamma=0.05, allocate=Budget(target_rank=2, t_initial=1, t_final=2)),
    SORSA(rank=4, allocate=Budget(target_rank=2, t_final=1, importance="code")),
    PiSSA(rank=4, allocate=Budget(target_rank=2, interval=2)),
]
every_allocated = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


class Loop:
    """A training written by hand: what a user of ``adapter`` alone would write."""

    def __init__(self, method=None, total: int = 8, model: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)) if model is None else model
        self.adapter = svdpeft.attach(self.model, METHODS[0] if method is None else method)
        self.optimizer = torch.optim.SGD(list(self.adapter.parameters()), lr=0.1, momentum=0.5)
        self.total = total
        self.x = torch.randn(5, 6)

    def backward(self) -> None:
        loss, penalty = self.model(self.x).square().mean(), self.adapter.penalty()
        (loss if penalty is None else loss + penalty).backward()

    def step(self) -> None:
        self.backward()
        self.adapter.before_step(0.1, self.total)
        self.optimizer.step()
        self.adapter.after_step()
        self.optimizer.zero_grad()

    def bare_step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


# -- left out by hand --------------------------------------------------------------------------------------------


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),  # raises no version
}


@every_allocated
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_without_the_methods_own_raises_in_the_next_forward(method, optimizer: str):
    loop = Loop(method)
    loop.optimizer = OPTIMIZERS[optimizer](list(loop.adapter.parameters()))
    loop.step()
    loop.step()
    loop.bare_step()
    with pytest.raises(RuntimeError, match=LEFT_OUT):
        loop.model(loop.x)


def test_before_step_alone_is_not_enough():
    loop = Loop()
    loop.backward()
    loop.adapter.before_step(0.1, loop.total)
    loop.optimizer.step()
    with pytest.raises(RuntimeError, match=r"0 has changed .* adapter.after_step"):
        loop.model(loop.x)


def test_a_weight_that_is_read_is_watched_too():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            return x @ self.w

    torch.manual_seed(0)
    model = Reads()
    adapter = svdpeft.attach(model, METHODS[0], ["w"])
    optimizer, x = torch.optim.SGD(list(adapter.parameters()), lr=0.1), torch.randn(2, 6)
    model(x).square().mean().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=LEFT_OUT):
        model(x)


def test_methods_without_a_budget_may_be_trained_by_hand():
    for method in (AdaLoRA(rank=4, allocate=None), SORSA(rank=2, gamma=0), SORSA(rank=2, mode="loss"), LoRA(rank=2)):
        loop = Loop(method)
        loop.bare_step()
        loop.bare_step()


def test_what_is_no_mistake_is_let_through(tmp_path):
    """Everything between two forwards that is not an optimizer's step alone."""
    loop = Loop()
    loop.step()
    loop.backward()  # gradients are accumulated
    loop.model(loop.x)  # another forward before the step
    loop.backward()
    loop.model.eval()
    loop.model(loop.x)
    loop.model.train()
    loop.step()
    with torch.no_grad():
        loop.model(loop.x)  # evaluation by another road
    loop.backward()
    loop.optimizer.zero_grad()  # a step that was skipped: an overflow in fp16
    loop.model(loop.x)
    loop.step()

    loop.model(loop.x)
    loop.model.load_state_dict(loop.model.state_dict())
    loop.model(loop.x)
    loop.adapter.save(tmp_path / "a")
    restore(loop.adapter, tmp_path / "a")
    loop.model(loop.x)
    loop.model.double().float()
    loop.model(loop.x)
    for twin in (copy.deepcopy(loop.model), pickle.loads(pickle.dumps(loop.model))):
        twin(loop.x)
        twin.train()(loop.x)
    loop.adapter.detach()
    again = svdpeft.load(loop.model, tmp_path / "a")
    loop.model(loop.x)
    again.merge()
    again.unmerge()
    loop.model(loop.x)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_runs_a_forward_twice(use_reentrant: bool):
    loop = Loop()
    for _ in range(3):
        x = loop.x.clone().requires_grad_()
        checkpoint(loop.model, x, use_reentrant=use_reentrant).square().mean().backward()
        loop.adapter.before_step(0.1, loop.total)
        loop.optimizer.step()
        loop.adapter.after_step()
        loop.optimizer.zero_grad()
    checkpoint(loop.model, x, use_reentrant=use_reentrant).square().mean().backward()
    loop.optimizer.step()
    with pytest.raises(RuntimeError, match=LEFT_OUT):
        loop.model(x)


def test_compiled_models_are_not_watched():
    torch.compiler.reset()
    loop = Loop()
    compiled = torch.compile(loop.model, fullgraph=True, backend="eager")
    for _ in range(2):
        compiled(loop.x).square().mean().backward()
        loop.optimizer.step()
    torch.testing.assert_close(compiled(loop.x), loop.model.eval()(loop.x))


# -- what must be known ------------------------------------------------------------------------------------------


@every_allocated
def test_the_number_of_steps_must_be_known_at_the_first(method):
    loop = Loop(method, total=None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"needs the number of optimizer steps.*Budget\(total_steps"):
        loop.step()


def test_the_number_of_steps_may_be_in_the_budget():
    told, known = (
        Loop(AdaLoRA(rank=3, allocate=Budget(t_initial=1)), total=5),
        Loop(
            AdaLoRA(rank=3, allocate=Budget(t_initial=1, total_steps=5)),
            total=None,  # type: ignore[arg-type]
        ),
    )
    for _ in range(5):
        told.step()
        known.step()
    for name, value in values(told.adapter).items():
        assert torch.equal(value, values(known.adapter)[name])


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda: Budget(target_rank=0), "target_rank 0 is not positive"),
        (lambda: Budget(interval=0), "interval 0 is less than 1"),
        (lambda: Budget(t_final=-1), "t_final -1 is less than 0"),
        (lambda: Budget(beta2=1.0), r"beta2 1.0 is outside \[0, 1\)"),
        (lambda: Budget(importance="both"), "importance 'both' is neither"),
        (lambda: Budget(t_initial=5, t_final=5, total_steps=10), "leave none of 10 steps"),
        (lambda: AdaLoRA(allocate={"target": 4}), "no field 'target': did you mean 'target_rank'"),
        (lambda: AdaLoRA(gamma=-1.0), "gamma -1.0 is negative"),
        (lambda: AdaLoRA(regulariser="sum"), "regulariser 'sum' is neither"),
        (lambda: AdaLoRA(scaling="rank"), "scaling 'rank' is neither"),
    ],
)
def test_bad_values_are_named(make_it, words: str):
    with pytest.raises(ValueError, match=words):
        make_it()


def test_a_target_above_the_rank_and_a_schedule_without_steps_are_named():
    with pytest.raises(ValueError, match=r"target_rank 5 is 10 triplets of the 8 in 2 matrices"):
        Loop(AdaLoRA(rank=4, allocate=Budget(target_rank=5))).step()
    with pytest.raises(ValueError, match="leave none of 8 steps"):
        Loop(AdaLoRA(rank=4, allocate=Budget(t_initial=4, t_final=4))).step()


def test_a_target_equal_to_the_rank_leaves_everything_in():
    loop = Loop(AdaLoRA(rank=4, allocate=Budget(target_rank=4)), total=3)
    for _ in range(3):
        loop.step()
    assert all(bool((site.factors.C != 0).all()) for site in loop.adapter.sites.values())


@every_allocated
def test_a_budget_goes_through_json(method):
    fields = json.loads(json.dumps(method.to_json()))
    assert svdpeft.method(fields.pop("name"))(**fields) == method
    assert isinstance(fields["allocate"], dict)


# -- what it does ------------------------------------------------------------------------------------------------


@every_allocated
def test_a_triplet_that_is_left_out_adds_exactly_nothing(method):
    loop = Loop(method)
    for _ in range(loop.total):
        loop.step()
    kept = [site.factors.memory["kept"] for site in loop.adapter.sites.values()]
    assert sum(int(k.sum()) for k in kept) == 4, "two per site in the mean"
    for site, k in zip(loop.adapter.sites.values(), kept, strict=True):
        for name in method.pruned:
            p, start = getattr(site.factors, name), site.factors._parameters.get(f"{name}0")
            p, start = (t if t is None or name != "L" else t.mT for t in (p, start))
            assert torch.equal(p[~k], torch.zeros_like(p[~k]) if start is None else start[~k])
        with torch.no_grad():
            for p in (site.factors.L, site.factors.A.mT):
                assert p[:, k].isfinite().all()


def test_a_triplet_grows_back_until_the_choice_is_fixed():
    """With an interval of three the values that were set to zero move in between; at the end they do not."""
    loop = Loop(AdaLoRA(rank=4, gamma=0.0, allocate=Budget(target_rank=1, t_final=3, interval=3)), total=9)
    zeros = []
    for _ in range(loop.total):
        loop.step()
        zeros.append(sum(int((site.factors.C == 0).sum()) for site in loop.adapter.sites.values()))
    assert zeros[2] > 0
    assert zeros[3] == 0
    assert zeros[5:] == [6, 6, 6, 6]


def test_an_overflow_teaches_nothing():
    loop = Loop()
    loop.step()
    before = {k: t.clone() for s in loop.adapter.sites.values() for k, t in s.factors.memory.items()}
    loop.backward()
    loop.adapter.sites["0"].factors.L.grad[0, 0] = float("inf")
    loop.adapter.before_step(0.1, loop.total)
    after = {k: t for s in loop.adapter.sites.values() for k, t in s.factors.memory.items()}
    assert all(torch.equal(t, after[k]) for k, t in before.items())
    loop.optimizer.zero_grad()
    loop.step()
    assert all(t.isfinite().all() for s in loop.adapter.sites.values() for t in s.factors.memory.values())


def test_a_new_training_begins_anew():
    loop = Loop(total=4)
    for _ in range(4):
        loop.step()
    loop.adapter.steps = 0  # as a new Trainer says
    loop.step()
    assert "kept" not in loop.adapter.sites["0"].factors.memory
    for _ in range(3):
        loop.step()
    assert "kept" in loop.adapter.sites["0"].factors.memory


# -- the Trainer and the callback --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, SORSA(rank=3, gamma=svdpeft.Adaptive(0.05))], ids=lambda m: m.name)
@pytest.mark.parametrize("cls", [svdpeft.Trainer, transformers.Trainer])
@pytest.mark.parametrize("step", [3, 5])
def test_a_resumed_run_ends_at_the_same_bits(method, cls, step: int, tmp_path):
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": step}

    def run(resume=None):
        model = make(WithLoss)
        adapter = svdpeft.attach(model, method, ["body", "head"], clip_rank=True)
        callbacks = [] if cls is svdpeft.Trainer else [svdpeft.AdapterCallback(adapter)]
        own = trainer(model, adapter, arguments(tmp_path, **args), cls, callbacks=callbacks)
        own.train(resume_from_checkpoint=resume)
        return adapter

    through = run()
    torch.manual_seed(99)
    resumed = run(str(tmp_path / f"checkpoint-{step}"))
    for name, value in values(through).items():
        assert torch.equal(value, values(resumed)[name]), name
    for name, site in through.sites.items():
        for key, t in site.factors.memory.items():
            assert torch.equal(t, resumed.sites[name].factors.memory[key])
    assert any(site.factors.memory for site in through.sites.values())


def test_the_trainer_drives_the_budget_and_the_callback_does_the_same(tmp_path):
    def run(cls):
        model = make(WithLoss)
        adapter = svdpeft.attach(model, METHODS[0], ["body", "head"], clip_rank=True)
        callbacks = [] if cls is svdpeft.Trainer else [svdpeft.AdapterCallback(adapter)]
        trainer(model, adapter, arguments(tmp_path, max_steps=6), cls, callbacks=callbacks).train()
        return adapter

    ours, stock = run(svdpeft.Trainer), run(transformers.Trainer)
    assert sum(int((site.factors.C != 0).sum()) for site in ours.sites.values()) == 4
    for name, value in values(ours).items():
        assert torch.equal(value, values(stock)[name]), name


def test_a_stock_trainer_without_the_callback_is_refused(tmp_path):
    model = make(WithLoss)
    adapter = svdpeft.attach(model, METHODS[0], ["body"])
    with pytest.raises(RuntimeError, match=LEFT_OUT):
        trainer(model, adapter, arguments(tmp_path), transformers.Trainer).train()


def test_a_checkpoint_without_what_was_remembered_is_refused(tmp_path):
    model = make()
    adapter = svdpeft.attach(model, METHODS[0], ["body"])
    trainer(model, adapter, arguments(tmp_path, save_strategy="steps", save_steps=2)).train()
    folder = tmp_path / "checkpoint-2"
    (folder / FILE).unlink()
    with pytest.raises(ValueError, match=r"lacks training\.safetensors"):
        trainer(model, adapter, arguments(tmp_path)).train(resume_from_checkpoint=str(folder))


def test_a_loop_by_hand_goes_on_as_well(tmp_path):
    through, first = Loop(), Loop()
    for _ in range(through.total):
        through.step()
    for _ in range(4):
        first.step()
    first.adapter.save(tmp_path / "adapter")
    save_training_state(first.adapter, tmp_path)
    torch.save(first.optimizer.state_dict(), tmp_path / "optimizer.pt")

    second = Loop()
    second.x, x = torch.randn(5, 6), second.x
    for _ in range(second.total):
        second.step()  # to the end, where a choice is remembered that the file knows nothing of
    second.x = x
    restore(second.adapter, tmp_path / "adapter")
    load_training_state(second.adapter, tmp_path)
    for name, site in first.adapter.sites.items():
        assert second.adapter.sites[name].factors.memory.keys() == site.factors.memory.keys()
    second.optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    for _ in range(4):
        second.step()
    for name, value in values(through.adapter).items():
        assert torch.equal(value, values(second.adapter)[name]), name

    other = svdpeft.attach(nn.ModuleDict({"other": nn.Linear(6, 8)}), METHODS[0])
    with pytest.raises(CheckpointError, match=r"names '0', which is no site"):
        load_training_state(other, tmp_path)
    plain = svdpeft.attach(nn.ModuleDict({"other": nn.Linear(6, 8)}), LoRA(rank=1))
    save_training_state(plain, tmp_path / "none")
    assert not (tmp_path / "none").exists(), "there is nothing to remember"
    load_training_state(plain, tmp_path)


@pytest.mark.parametrize("importance", ["paper", "code"])
@pytest.mark.parametrize("total", [1, 2])
def test_a_budget_leaves_something_even_of_one_triplet(importance: str, total: int):
    """Two thirds of one triplet are one, and a choice that is fixed at the first step has looked at it."""
    model = nn.Sequential(nn.Linear(6, 5)).double()
    method = AdaLoRA(rank=1, allocate=Budget(importance=importance, total_steps=total))  # type: ignore[arg-type]
    adapter = attach(model, method, ["0"])
    optimizer, x = torch.optim.SGD(adapter.parameters(), lr=0.5), torch.randn(4, 6).double()
    for _ in range(total):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        adapter.before_step(0.5)
        optimizer.step()
        adapter.after_step()
    assert bool(adapter.delta("0").abs().max() > 0)


def test_a_target_that_leaves_nothing_is_refused_at_the_first_step():
    model = nn.Sequential(nn.Linear(6, 5))
    adapter = attach(model, LoRA(rank=2, allocate=Budget(target_rank=0.4, t_initial=5, total_steps=9)), ["0"])
    model(torch.randn(4, 6)).sum().backward()
    with pytest.raises(ValueError, match=r"target_rank 0\.4 is 0 triplets of the 2"):
        adapter.before_step(0.1)
