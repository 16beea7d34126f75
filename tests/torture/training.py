"""Trainings that are killed and gone on with until they end: they end with the values of one that was left alone.

python tests/torture/training.py FOLDER KILLS
"""

from __future__ import annotations

import random
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from torch import Tensor, nn
from torture.kills import Span, attempt, draws

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


def finish(folder: Path, stock: bool, steps: int, expected: dict[str, Tensor]) -> None:
    """Train to the end, which must be the expected one."""
    found = go_on(folder, stock, steps)
    assert all(torch.equal(found[name], value) for name, value in expected.items()), "it ended elsewhere"


def killed_until_it_ends(
    folder: Path, stock: bool, steps: int, expected: dict[str, Tensor], span: Span, draw: random.Random
) -> int:
    """How often one training was killed, each time soon after it has begun to write again; it ends as expected."""
    kills = 0
    while attempt(lambda: finish(folder, stock, steps, expected), **draws(span, draw)).killed:
        kills += 1
    return kills


def main(folder: Path, count: int, steps: int = 30) -> None:
    """At least so many kills of each of the two trainers, in trainings of so many steps, a checkpoint after each."""
    for stock in (False, True):
        begun, draw, kills, ended = time.monotonic(), random.Random(0), 0, 0
        expected = go_on(folder / "whole", stock, steps)
        shutil.rmtree(folder / "whole")
        whole = attempt(lambda stock=stock, e=expected: finish(folder / f"{stock}", stock, steps, e)).span
        few = Span(2 * whole.operations // steps, 2 * whole.seconds / steps)  # of two checkpoints
        while kills < count:
            where = folder / f"{stock}-{ended}"
            kills += killed_until_it_ends(where, stock, steps, expected, few, draw)
            ended += 1
            shutil.rmtree(where)
        name, seconds = "AdapterCallback" if stock else "svdpeft.Trainer", time.monotonic() - begun
        print(f"{name}: {kills} kills in {seconds:.0f} s, {ended} trainings ended as expected", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
