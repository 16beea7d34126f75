"""A training that diverges stops before the optimizer spreads it, keeps the last good values, and ranks last."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_trainer import Bare, WithLoss, arguments, data, make, trainer, values
from torch import nn

import svdpeft
from svdpeft import SORSA, LoRA
from svdpeft.compare import runner
from svdpeft.compare.reading import read_spec
from svdpeft.compare.report.cells import left_out
from svdpeft.compare.report.limits import limits
from svdpeft.compare.report.results import read
from svdpeft.compare.report.text import markdown, terminal
from svdpeft.compare.store import Store
from svdpeft.training.callback import StepCallback
from svdpeft.training.divergence import MOST_SKIPPED, Diverged

BOTH = pytest.mark.parametrize("stock", [False, True], ids=["own", "stock"])


def run(adapter: Any, folder: Path, stock: bool, rows: Any, **options: Any) -> None:
    if stock:
        callbacks = [svdpeft.AdapterCallback(adapter)]
        made = trainer(
            adapter.model,
            adapter,
            arguments(folder, **options),
            transformers.Trainer,
            callbacks=callbacks,
            train_dataset=rows,
        )
    else:
        made = trainer(adapter.model, adapter, arguments(folder, **options), train_dataset=rows)
    made.train()


class Third(nn.Module):
    """A model whose third backward gives no number at one of its layers."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.inner, self.value, self.calls = make(WithLoss), value, 0
        self.inner.head.register_full_backward_hook(self._spoil)

    def _spoil(self, module: nn.Module, given: Any, out: Any) -> Any:
        self.calls += 1
        return tuple(g * self.value if self.calls == 3 else g for g in given)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        return self.inner(x, labels)


@BOTH
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_stops_before_the_optimizer_and_keeps_the_last_good_values(value, clip, accumulation, stock, tmp_path: Path):
    found = {}
    for steps in (2 if accumulation == 1 else 1, 6):
        model = Third(value)
        adapter = svdpeft.attach(model, SORSA(rank=2), ["body"], train=["inner.head"])
        options = {"max_steps": steps, "max_grad_norm": clip, "gradient_accumulation_steps": accumulation}
        options |= {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 1}
        if steps < 6:
            run(adapter, tmp_path / "good", stock, data(48), **options)
        else:
            with pytest.raises(
                Diverged, match=rf"step {3 if accumulation == 1 else 2}: the gradient of .*inner\.body/"
            ):
                run(adapter, tmp_path / "bad", stock, data(48), **options)
        found[steps] = values(adapter)
        assert all(p.isfinite().all() for p in adapter.parameters())
    good, bad = found.values()
    for name, value_ in good.items():
        assert torch.equal(bad[name], value_), name
    last = sorted((tmp_path / "bad").glob("checkpoint-*"))[-1]
    adapter.detach()
    loaded = svdpeft.load(model, last)
    for name, value_ in values(loaded).items():
        assert torch.equal(good[name], value_), "the last checkpoint is a good one"


@BOTH
def test_a_loss_that_is_no_number_from_the_start(stock, tmp_path: Path):
    rows = data()
    rows[0]["x"] = rows[0]["x"] * math.nan
    adapter = svdpeft.attach(make(WithLoss), LoRA(rank=1), ["body"])
    with pytest.raises(Diverged, match=r"comes from the data or from the model's dtype"):
        run(adapter, tmp_path, stock, rows, per_device_train_batch_size=24)


def test_a_step_that_a_scaler_leaves_out_is_no_divergence_and_many_are():
    """Gradients in float16 overflow now and then, and a scaler skips the step."""

    class Skips:
        step_was_skipped, param_groups = True, [{"lr": 0.1}]

    adapter = svdpeft.attach(make(Bare), LoRA(rank=1), ["body"])
    callback, args = StepCallback(adapter), transformers.TrainingArguments(report_to="none", use_cpu=True)
    state, control = transformers.TrainerState(max_steps=99), transformers.TrainerControl()
    good = type("Steps", (Skips,), {"step_was_skipped": False})
    for _ in range(3):
        for _ in range(MOST_SKIPPED - 1):
            callback.on_optimizer_step(args, state, control, optimizer=Skips())
        callback.on_optimizer_step(args, state, control, optimizer=good())
    assert adapter.steps == 3
    for _ in range(MOST_SKIPPED - 1):
        callback.on_optimizer_step(args, state, control, optimizer=Skips())
    with pytest.raises(Diverged, match="the last 32 steps were skipped"):
        callback.on_optimizer_step(args, state, control, optimizer=Skips())


# -- in a comparison -------------------------------------------------------------------------------------------------


def test_a_run_that_diverged_is_recorded_and_ranked_last(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its accuracy, had of logits that are no numbers, would be the best: class 0 is what argmax says of them."""
    real = runner.run

    def some_diverge(job: Any, *rest: Any) -> Any:
        if job.entry.label == "SORSA" or (job.entry.label == "PiSSA" and job.seed == 1):
            monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: spoil(self))
        try:
            return real(job, *rest)
        finally:
            monkeypatch.setattr(torch.optim.AdamW, "step", step)

    step = torch.optim.AdamW.step

    def spoil(optimizer: Any) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.mul_(1e30)

    monkeypatch.setattr(runner, "run", some_diverge)
    records = runner.compare(read_spec(**tiny, methods="lora,sorsa,pissa,full"), tmp_path)
    diverged = [(r["label"], r["identity"]["seed"]) for r in records if "diverged" in r]
    assert diverged == [("SORSA", 0), ("SORSA", 1), ("PiSSA", 1)]
    assert all("error" not in r for r in records)
    found = read(Store(tmp_path))
    assert [row.label for row in found.rows][-1] == "PiSSA"
    assert found.rows[-1].diverged == 1
    assert "SORSA" not in [row.label for row in found.rows]
    (heading, lines) = left_out(found)[0]
    assert heading == "Diverged"
    assert {line.partition(",")[0] for line in lines} == {"SORSA", "PiSSA"}
    assert all("after the training" in line or "the gradient of" in line for line in lines)
    tested = [d.label for d in found.differences[None]]
    assert tested == ["Full"]
    text = markdown(found)
    assert "1, 1 more diverged" in text
    assert any("3 runs diverged" in line and "stand last and are not tested" in line for line in limits(found))
    assert terminal(found) is not None
    again = runner.compare(read_spec(**tiny, methods="lora,sorsa,pissa,full"), tmp_path)  # a result: not done again
    assert [r["date"] for r in again] == [r["date"] for r in records]


def test_a_baseline_that_diverged_is_said_to_have(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = runner.run

    def diverges(job: Any, *rest: Any) -> Any:
        if job.entry.label == "LoRA":
            raise Diverged("step 3: the gradient of body/L is not finite")
        return real(job, *rest)

    monkeypatch.setattr(runner, "run", diverges)
    runner.compare(read_spec(**tiny, methods="lora,pissa"), tmp_path)
    assert read(Store(tmp_path)).differences[None] == "the baseline LoRA diverged"


@pytest.mark.parametrize("worst", ["diverges", "loss is null"])
def test_a_search_prefers_no_trial_that_diverged(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worst: str
):
    def trial(job: Any, callbacks: Any = ()) -> Any:
        if job.entry.lr > 1e-3:
            if worst == "diverges":
                raise Diverged("step 2: the gradient of body/L is not finite")
            return {"metric": "accuracy", "value": 1.0, "loss": None}  # as an earlier revision wrote of NaN
        return {"metric": "accuracy", "value": 0.5 - job.entry.lr, "loss": 0.7}

    monkeypatch.setattr(runner, "trial", trial)
    monkeypatch.setattr(runner, "run", lambda job, *rest: {"search": job.search})
    records = runner.compare(read_spec(**{**tiny, "search": {}}, methods="full:lr=1e-3"), tmp_path)
    assert records[0]["identity"]["lr"] == 1e-4


def test_a_trial_is_judged_by_its_loss_too(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A search by accuracy alone would not see that the logits are no numbers."""
    from comparison import Net

    forward = Net.forward
    monkeypatch.setattr(
        Net, "forward", lambda self, x: forward(self, x) * (1.0 if torch.is_grad_enabled() else math.nan)
    )
    spec = read_spec(**{**tiny, "search": {"metric": "accuracy", "trials": 3}}, methods="full")
    records = runner.compare(spec, tmp_path)
    trials, _ = Store(tmp_path).read("trials")
    assert trials
    assert all("after the training the loss of the model is nan" in t["diverged"] for t in trials)
    assert all("diverged" in r for r in records)
