"""What a training needs to go on, beside the adapter: what a method keeps from step to step, such as running averages.

The adapter's file is complete without it. A training that is to continue to the same weights needs it as well.
"""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.file import FOLDER, CheckpointError
from svdpeft.adapter.loading import restore
from svdpeft.atomic import replacing
from svdpeft.sites.shards import write_once

FILE = "training.safetensors"  # beside the folder of the adapter


def keeps_state(adapter: Adapter) -> bool:
    """Whether one of the adapter's methods keeps something from step to step."""
    return any(site.method.keeps_state for site in adapter.sites.values())


def save_checkpoint(adapter: Adapter, folder: Path) -> None:
    """Write the adapter into a trainer's checkpoint, and what its methods remember beside it."""
    adapter.save(folder / FOLDER)
    save_training_state(adapter, folder)


def load_checkpoint(adapter: Adapter, folder: Path) -> None:
    """Let an attached adapter be what it was where ``save_checkpoint`` was called.

    Raises:
        CheckpointError: a file is missing, or of another adapter or base.
    """
    restore(adapter, folder / FOLDER)
    load_training_state(adapter, folder)


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
        CheckpointError: the file is missing or of another adapter.
    """
    if not keeps_state(adapter):
        return
    path = Path(folder) / FILE
    if not path.is_file():
        method = next(site.method for site in adapter.sites.values() if site.method.keeps_state)
        raise CheckpointError(f"{path} is missing: {method} cannot go on without what it remembers of the training")
    with safe_open(path, "pt") as file:
        steps = (file.metadata() or {}).get("steps", "")
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    split = {name: tuple(name.rsplit("/", 1)) for name in found}
    if not steps.isdigit() or (unknown := [name for name, (site, *_) in split.items() if site not in adapter.sites]):
        what = f"names {unknown[0]}, which is no site" if steps.isdigit() else "does not say the step"
        raise CheckpointError(f"{path} is of another adapter, or damaged: it {what}")
    for site in adapter.sites.values():
        site.factors.memory.clear()
    for name, (site, key) in split.items():
        adapter.sites[site].factors.memory[key] = found[name]
    adapter.steps = int(steps)
