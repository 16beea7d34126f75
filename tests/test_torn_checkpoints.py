"""Checkpoints that a kill or a full disk has left, and steps that a scaler of float16 leaves out."""

from __future__ import annotations

import builtins
import io
import os
import re
import shutil
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torture.training import main, resume, trainer_in, values

from svdpeft import OFT, SORSA, AdaLoRA, Budget, LoRA, attach, last_checkpoint
from svdpeft.training.callback import StepCallback

NEEDED = ("adapter/adapter.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def whole(folder: Path, stock: bool) -> dict[str, Tensor]:
    """What a training comes to; its checkpoints, of steps 2, 4 and 6, stay."""
    trainer, adapter = trainer_in(folder, stock)
    trainer.train()
    shutil.rmtree(folder / "checkpoint-6")
    return values(adapter)


@pytest.mark.parametrize("lost", [*NEEDED, "half of trainer_state.json"])
@pytest.mark.parametrize("stock", [True, False])
def test_the_last_whole_one_is_gone_on_from(stock: bool, lost: str, tmp_path: Path):
    expected = whole(tmp_path, stock)
    path = tmp_path / "checkpoint-4" / lost.removeprefix("half of ")
    path.write_bytes(path.read_bytes()[:20]) if lost.startswith("half") else path.unlink()
    name = lost.removeprefix("half of ")
    name = name if "/" in name or name.endswith("json") else f"{Path(name).stem}.*"
    trainer, adapter = trainer_in(tmp_path, stock)
    # A stock trainer reads its own state before it asks anybody.
    said = None if stock and name == "trainer_state.json" else re.escape(f"checkpoint-4 lacks {name}")
    with pytest.raises((ValueError, OSError), match=said):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trainer, adapter = trainer_in(tmp_path, stock)
    with pytest.warns(UserWarning, match=r"going on from .*checkpoint-2: checkpoint-4 lacks"):
        resume(trainer, stock, tmp_path)
    assert trainer.state.global_step == 6
    for key, value in values(adapter).items():
        assert torch.equal(value, expected[key])


def test_none_is_whole(tmp_path: Path):
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    with pytest.raises(ValueError, match=r"no whole checkpoint: checkpoint-3 lacks adapter/"):
        last_checkpoint(tmp_path)


@pytest.mark.parametrize("stock", [True, False])
def test_kills_within_a_checkpoint(stock: bool, tmp_path: Path):
    """At every file that is written; ``make torture`` kills anywhere."""
    expected = whole(tmp_path / "whole", stock)
    ends = []
    for at in range(1, 12):
        folder = tmp_path / f"{at}"
        shutil.copytree(tmp_path / "whole", folder)
        shutil.rmtree(folder / "checkpoint-4")
        process = os.fork()
        if not process:
            try:
                _die_at(at)
                trainer, _ = trainer_in(folder, stock)
                trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
            finally:
                os._exit(0)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        trainer, adapter = trainer_in(folder, stock)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            resume(trainer, stock, folder)
        for key, value in values(adapter).items():
            assert torch.equal(value, expected[key]), at
    assert ends.count(-signal.SIGKILL) > 3


def _die_at(number: int) -> None:
    """Be killed half way through a file that is opened for writing, the so-manieth in a checkpoint."""
    opened = 0
    real, save = builtins.open, torch.save

    def die(path: Any) -> None:
        nonlocal opened
        opened += 1
        if opened == number:
            with real(path, "wb") as file:
                file.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    def opening(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode and "checkpoint-4" in str(path):
            die(path)
        return real(path, mode, *args, **kwargs)

    def saving(what: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        if "checkpoint-4" in str(path):
            die(path)
        return save(what, path, *args, **kwargs)

    builtins.open = io.open = opening
    torch.save = saving


def test_trainings_that_are_killed(tmp_path: Path):
    main(tmp_path, 2, steps=8)


# -- steps that are left out ------------------------------------------------------------------------------------------

METHODS = [
    *(AdaLoRA(rank=2, allocate=Budget(1, 1, 1, 1, importance=importance)) for importance in ("paper", "code")),
    SORSA(rank=2, mode="decoupled", gamma=0.1),
    SORSA(rank=2, mode="retract"),
    SORSA(rank=2, mode="gradient", gamma=0.1),
    OFT(block_size=2),
    LoRA(rank=2),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("left_out", [0, 2])
def test_a_step_that_a_scaler_leaves_out_is_none(method: Any, left_out: int):
    """Float16 under autocast on the CPU: the training is the one without that batch, to the same bits."""

    def train(with_overflow: bool) -> tuple[dict[str, Tensor], int]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
        adapter = attach(model, method, ["0", "2"])
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=10**6, backoff_factor=0.999999)
        batches = list(torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(1)))
        if with_overflow:
            batches.insert(left_out, torch.full((3, 6), 3e4))
        for x in batches:
            with torch.autocast("cpu", torch.float16):
                loss = model.train()(x).float().square().mean()
            if x.max() > 1e4:
                loss = loss * float("inf")
            penalty = adapter.penalty()
            scaler.scale(loss if penalty is None else loss + penalty).backward()
            scaler.unscale_(optimizer)
            adapter.before_step(1e-2, total_steps=6)
            scaler.step(optimizer)
            scaler.update(2.0**8)
            adapter.after_step(1.0)
            optimizer.zero_grad()
        return values(adapter), adapter.steps

    plain, overflown = train(False), train(True)
    assert plain[1] == overflown[1] == 5
    for name, value in plain[0].items():
        assert torch.equal(value, overflown[0][name]), name


def test_a_trainer_counts_no_step_that_was_left_out():
    """Neither does the schedule lack it in the end: of fewer steps it is at its end after fewer."""
    seen = []

    class Told(LoRA):
        def before_step(self, sites: Any, progress: Any) -> None:
            seen.append((progress.step, progress.total))

    adapter = attach(nn.Sequential(nn.Linear(4, 3)), Told(rank=1))
    callback = StepCallback(adapter)
    args: Any = SimpleNamespace(learning_rate=0.1)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}], step_was_skipped=False)
    state: Any = SimpleNamespace(global_step=0, max_steps=5)
    callback.on_train_begin(args, state, cast(Any, None))
    for skipped in (True, False, False, True, False):
        optimizer.step_was_skipped = skipped
        callback.on_pre_optimizer_step(args, state, cast(Any, None))
        callback.on_optimizer_step(args, state, cast(Any, None), optimizer=optimizer)
        state.global_step += 1
    assert seen == [(1, 5), (1, 4), (2, 4), (3, 4), (3, 3)]
    assert adapter.steps == 3
