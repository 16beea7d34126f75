"""``svdpeft merge``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from svdpeft.cli.app import Json, app, console, fail, quiet

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="Folder of a model, as transformers or timm writes it.")],
    adapters: Annotated[list[str], typer.Argument(help="Folders of adapters; ADAPTER:WEIGHT multiplies its update.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Of the new weights; the base's unless said.")] = None,
    stochastic_rounding: Annotated[
        bool, typer.Option("--stochastic-rounding", help="Round to half precision so that it is right on average.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the stochastic rounding.")] = 0,
    shard_size: Annotated[str | None, typer.Option(help="Of a file: 2GB; the base's files unless said.")] = None,
    no_check_base: Annotated[
        bool, typer.Option("--no-check-base", help="Merge into another base than the adapters were made for.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Merge adapters into a model that stays on the disk, tensor by tensor.

    Example: svdpeft merge llama math:0.7 code:0.3 llama-both --dtype bfloat16
    """
    import torch

    from svdpeft import folders

    quiet()
    try:
        report = folders.merge(
            base,
            [_weighted(adapter) for adapter in adapters],
            out,
            dtype=None if dtype is None else getattr(torch, dtype),
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            shard_size=shard_size,
            check_base=not no_check_base,
        )
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        fail(error)
    if as_json:
        print(json.dumps({"out": str(out), "lost": report.lost}))
    else:
        console.print(f"{out}: {report}", soft_wrap=True, highlight=False, markup=False)


def _weighted(word: str) -> tuple[str, float]:
    """``ADAPTER:WEIGHT``, or a folder alone."""
    path, colon, weight = word.rpartition(":")
    if not colon or Path(word).exists():
        return word, 1.0
    try:
        return path, float(weight)
    except ValueError as error:
        raise ValueError(f"{word!r} is neither a folder nor ADAPTER:WEIGHT: {weight!r} is no number") from error
