"""What a training needs to go on, beside the adapter: what a method keeps from step to step, such as running averages.

The adapter's file is complete without it. A training that is to continue to the same weights needs it as well.
"""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.file import FOLDER, CheckpointError, read_tensors, undamaged
from svdpeft.adapter.loading import restore
from svdpeft.atomic import replacing
from svdpeft.sites.shards import write_once

FILE = "training.safetensors"  # beside the folder of the adapter


def keeps_state(adapter: Adapter) -> bool:
    """Whether one of the adapter's methods keeps something from step to step."""
    return any(site.method.keeps_state for site in adapter.sites.values())


def save_checkpoint(adapter: Adapter, folder: Path) -> None:
    """Write the adapter into a trainer's checkpoint, and what its methods remember beside it."""
    adapter.save(folder / FOLDER, bases="stored")  # a training goes on with the very bits
    save_training_state(adapter, folder)


def load_checkpoint(adapter: Adapter, folder: Path) -> None:
    """Let an attached adapter be what it was where ``save_checkpoint`` was called.

    Raises:
        CheckpointError: a file is missing, damaged, or of another adapter or base. Nothing has changed then.
    """
    remembered = _remembered(adapter, folder)
    restore(adapter, folder / FOLDER)
    _remember(adapter, *remembered)


def save_training_state(adapter: Adapter, folder: str | os.PathLike[str]) -> None:
    """Write what the methods remember, and the number of the step, into ``folder/training.safetensors``.

    Nothing is written where no method remembers anything.
    """
    if keeps_state(adapter):
        sites = adapter.sites.items()
        tensors = {f"{name}/{key}": t.contiguous().clone() for name, s in sites for key, t in s.factors.memory.items()}

        def write_file() -> None:
            with replacing(Path(folder) / FILE) as new:
                save_file(tensors, new, metadata={"steps": str(adapter.steps)})

        write_once(adapter.model, write_file)


def load_training_state(adapter: Adapter, folder: str | os.PathLike[str]) -> None:
    """Let a training go on where ``save_training_state`` was called; the weights are restored by themselves.

    Raises:
        CheckpointError: the file is missing, damaged or of another adapter. Nothing has changed then.
    """
    _remember(adapter, *_remembered(adapter, Path(folder)))


def _remembered(adapter: Adapter, folder: Path) -> tuple[int | None, dict[tuple[str, str], Tensor]]:
    """The number of the step, ``None`` where nothing is remembered, and (site, key) -> what was, checked."""
    if not keeps_state(adapter):
        return None, {}
    path = folder / FILE
    if not path.is_file():
        method = next(site.method for site in adapter.sites.values() if site.method.keeps_state)
        raise CheckpointError(f"{path} is missing: {method} cannot go on without what it remembers of the training")
    with undamaged(path):
        metadata, found = read_tensors(path)
    split = {(name.rpartition("/")[0], name.rpartition("/")[2]): tensor for name, tensor in found.items()}
    steps = metadata.get("steps", "")
    counted = steps.isdecimal() and len(steps) < 20
    if not counted or (unknown := [site for site, _ in split if site not in adapter.sites]):
        what = f"names {unknown[0]!r}, which is no site" if counted else "does not say the step"
        raise CheckpointError(f"{path} is of another adapter, or damaged: it {what}")
    return int(steps), split


def _remember(adapter: Adapter, steps: int | None, remembered: dict[tuple[str, str], Tensor]) -> None:
    if steps is None:
        return
    for site in adapter.sites.values():
        site.factors.memory.clear()
    for (site, key), tensor in remembered.items():
        adapter.sites[site].factors.memory[key] = tensor
    adapter.steps = steps
