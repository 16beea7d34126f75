"""Which checkpoint of a training is whole: a kill or a full disk may have left one that is not."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.file import FOLDER, TENSORS
from svdpeft.training.resume import FILE, keeps_state

NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
TRAINER = ("optimizer", "scheduler", "rng_state")  # how what else a trainer writes begins, in one process or several
SHARDED = ("global_step",)  # DeepSpeed's folder, with the optimizer and the scheduler


def lacks(folder: Path, adapter: Adapter | None = None, values_only: bool = False) -> list[str]:
    """What a checkpoint does not have of what a training needs to go on to the same weights.

    Args:
        folder: of the checkpoint.
        adapter: that is trained, whose methods may have to remember something.
        values_only: the trainer was told to save nothing of its own.
    """
    names = os.listdir(folder)
    missing = [] if (folder / FOLDER / TENSORS).is_file() else [f"{FOLDER}/{TENSORS}"]
    if adapter is not None and keeps_state(adapter) and FILE not in names:
        missing.append(FILE)
    if not values_only and not any(name.startswith(SHARDED) for name in names):
        missing += [f"{what}.*" for what in TRAINER if not any(name.startswith(what) for name in names)]
    try:  # which a trainer writes last
        whole = isinstance(json.loads((folder / TRAINER_STATE_NAME).read_text())["global_step"], int)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        whole = False
    return missing if whole else [*missing, TRAINER_STATE_NAME]


def last_checkpoint(folder: str | os.PathLike[str], adapter: Adapter | None = None) -> Path | None:
    """Return the last whole checkpoint of a training; of later ones that are not, a warning says what they lack.

    Args:
        folder: the ``output_dir`` of the trainer.
        adapter: that is trained.

    Returns:
        For ``trainer.train(resume_from_checkpoint=…)``; ``None``: there is no checkpoint.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    there = sorted((int(found[1]), path) for path in Path(folder).iterdir() if (found := NAME.fullmatch(path.name)))
    torn = []
    for _, path in reversed(there):
        if missing := lacks(path, adapter):
            torn.append(f"{path.name} lacks {', '.join(missing)}")
            continue
        if torn:
            warnings.warn(f"going on from {path}: {'; '.join(torn)}", stacklevel=2)
        return path
    if torn:
        raise ValueError(f"{folder} has no whole checkpoint: {'; '.join(torn)}")
    return None


def check_checkpoint(path: Path, adapter: Adapter, values_only: bool) -> None:
    """Refuse a checkpoint from which a training would go on elsewhere, without a word.

    Raises:
        ValueError: with what it lacks.
    """
    if path.is_dir() and (missing := lacks(path, adapter, values_only)):
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: a training that goes on from it ends elsewhere. The last whole one is "
            f"svdpeft.last_checkpoint({os.fspath(path.parent)!r}); adapter.load_state_dict() takes the values alone"
        )
