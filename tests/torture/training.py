"""Trainings that are killed and gone on with until they end: they end with the values of one that was left alone.

python tests/torture/training.py FOLDER KILLS
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import svdpeft


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = torch.nn.functional.dropout(x, 0.5, self.training)  # so that the random state matters
        return {"loss": (self.fc(x) - labels).square().mean()}


def trainer_in(folder: Path, stock: bool, **options: Any) -> tuple[transformers.Trainer, svdpeft.Adapter]:
    """A trainer, ours or transformers' own with a callback, that saves every second of six steps."""
    torch.manual_seed(0)
    model = Regression()
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=2), ["fc"])
    generator = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(4, generator=generator), "labels": torch.randn(3, generator=generator)} for _ in range(8)]
    options = {"max_steps": 6, "save_steps": 2, "learning_rate": 0.1, **options}
    args = transformers.TrainingArguments(
        str(folder), report_to="none", disable_tqdm=True, use_cpu=True, per_device_train_batch_size=2, **options
    )
    if stock:
        callbacks: list[Any] = [svdpeft.AdapterCallback(adapter)]
        return transformers.Trainer(model, args, train_dataset=data, callbacks=callbacks), adapter
    return svdpeft.Trainer(model, adapter, args, train_dataset=data), adapter


def values(adapter: svdpeft.Adapter) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in adapter.named_parameters()}


def resume(trainer: transformers.Trainer, stock: bool, folder: Path) -> None:
    """Go on from the last whole checkpoint."""
    last = svdpeft.last_checkpoint(folder) if stock else None
    trainer.train(resume_from_checkpoint=str(last) if stock else True)


def go_on(folder: Path, stock: bool, steps: int) -> dict[str, Tensor]:
    """Train to the end, from the start where no checkpoint is whole yet."""
    trainer, adapter = trainer_in(folder, stock, max_steps=steps, save_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            there = svdpeft.last_checkpoint(folder) if folder.exists() else None
        except ValueError:
            there = None
        trainer.train() if there is None else resume(trainer, stock, folder)
    return values(adapter)


def killed_until_it_ends(folder: Path, stock: bool, steps: int, draw: random.Random) -> int:
    """How often one training was killed; it ends with the expected values."""
    begun = time.monotonic()
    expected = go_on(folder / "whole", stock, steps)
    takes, kills = time.monotonic() - begun, 0
    while True:
        process = os.fork()
        if not process:
            status = 1
            try:
                found = go_on(folder / "killed", stock, steps)
                status = 0 if all(torch.equal(found[name], value) for name, value in expected.items()) else 2
            finally:
                os._exit(status)
        time.sleep(draw.random() * 1.5 * takes)
        os.kill(process, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if status == 0:
            return kills
        assert status == -signal.SIGKILL, "it could not go on" if status == 1 else "it ended elsewhere"
        kills += 1


def main(folder: Path, count: int, steps: int = 30) -> None:
    """At least so many kills of each of the two trainers, in trainings of so many steps."""
    for stock in (False, True):
        draw, kills, ended = random.Random(0), 0, 0
        while kills < count:
            where = folder / f"{stock}-{ended}"
            kills += killed_until_it_ends(where, stock, steps, draw)
            ended += 1
            shutil.rmtree(where)
        name = "AdapterCallback" if stock else "svdpeft.Trainer"
        print(f"{name}: {kills} kills, {ended} trainings ended as expected", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
