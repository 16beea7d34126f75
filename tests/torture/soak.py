"""A process that attaches, trains and lets go again and again: its memory stays what it was.

python tests/torture/soak.py ATTACHMENTS
"""

from __future__ import annotations

import copy
import gc
import os
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from rows import methods
from torch import Tensor, nn
from torch.utils.data import Dataset

import svdpeft

GROWTH = 16 * 2**20  # bytes from half of the way to its end
EACH = 33  # attachments to one training


class Points(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.full((16,), float(index)), "labels": torch.ones(12)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 12)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.second(torch.tanh(self.first(x))) - labels).square().mean()}


def attached(method: svdpeft.Method, folder: Path) -> None:
    """What a session does with an adapter: a step, off, merged, a copy, a file and back."""
    model, x = Model(), torch.ones(4, 16)
    adapter = svdpeft.attach(model, method, clip_rank=True)
    model(x, torch.ones(4, 12))["loss"].backward()
    with adapter.disabled():
        model(x, torch.ones(4, 12))
    if svdpeft.adapters(model):
        adapter.merge()
        adapter.unmerge()
    copy.deepcopy(model)
    adapter.save(folder / "a")
    adapter.detach()
    svdpeft.load(model, folder / "a").detach()


def trained(method: svdpeft.Method, folder: Path) -> None:
    model = Model()
    adapter = svdpeft.attach(model, method, clip_rank=True)
    args = transformers.TrainingArguments(
        output_dir=str(folder / "out"), max_steps=3, save_steps=2, report_to="none", disable_tqdm=True, use_cpu=True
    )
    svdpeft.Trainer(
        model, adapter, args, train_dataset=Points(), data_collator=transformers.default_data_collator
    ).train()


def resident() -> int:
    """Bytes that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main(count: int) -> None:
    """So many attachments, and a training to every 33; ends with an error where memory has grown."""
    known = [method for method in methods(True) if not method.needs]
    begun, first, trainings = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for i in range(count):
            attached(known[i % len(known)], folder)
            if i % EACH == 0:
                trained(known[i // EACH % len(known)], folder)
                trainings += 1
            if i == count // 2:
                gc.collect()
                first = resident()
    gc.collect()
    grown = resident() - first
    told = f"{count} attachments and {trainings} trainings in {time.monotonic() - begun:.0f} s"
    assert grown < GROWTH, f"{told} took {grown / 2**20:.0f} MiB"
    print(f"{told}: {max(grown, 0) / 2**20:.1f} MiB more than after half of them")


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main(int(sys.argv[1]))
