"""What commands on adapters share: the model that one is for, a new folder, how a result is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from svdpeft.cli.app import console
from svdpeft.cli.completion import model_names

Base = Annotated[
    str | None,
    typer.Option(
        help="Model that it is for: embedded, hf:NAME, timm:NAME, a folder; else what its training wrote.",
        autocompletion=model_names,
    ),
]
Precision = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the model's weights.")]
Weighted = Annotated[list[str], typer.Argument(help="Folders of adapters; ADAPTER:WEIGHT multiplies its update.")]


def model_of(base: str, dtype: str) -> Any:
    """Load a model by its name."""
    import torch

    from svdpeft.models import load

    return load(base, dtype=getattr(torch, dtype)).model


def opened(base: str, adapter: Path, dtype: str) -> Any:
    """An adapter beside its model: one of transformers or timm stays on the disk where the format lets it."""
    import svdpeft
    from svdpeft import CheckpointError, folders
    from svdpeft.models.language import folder_of

    try:
        return folders.opened(folder_of(base), adapter)
    except CheckpointError:
        raise
    except ValueError:  # no such folder, or tensors that differ from the model's: quantised, say, or other names
        return svdpeft.load(model_of(base, dtype), adapter)


def check_new(out: Path) -> None:
    """Refuse to overwrite.

    Raises:
        FileExistsError: ``out`` is there.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: nothing is overwritten")


def tell(told: str, found: dict[str, Any], as_json: bool) -> None:
    """Print what was made."""
    if as_json:
        print(json.dumps(found))
    else:
        console.print(told, soft_wrap=True, highlight=False, markup=False)


def weighted(word: str) -> tuple[str, float]:
    """Take ``ADAPTER:WEIGHT`` apart; a folder alone has the weight 1.

    Raises:
        ValueError: neither of the two.
    """
    path, colon, weight = word.rpartition(":")
    if not colon or Path(word).exists():
        return word, 1.0
    try:
        return path, float(weight)
    except ValueError as error:
        raise ValueError(f"{word!r} is neither a folder nor ADAPTER:WEIGHT: {weight!r} is no number") from error
