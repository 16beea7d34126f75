"""``svdpeft merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from svdpeft.cli.adapters import Weighted, tell, weighted
from svdpeft.cli.app import Json, app, fail, quiet
from svdpeft.cli.completion import model_names

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@app.command()
def merge(
    base: Annotated[
        str,
        typer.Argument(
            help="Folder of a model of transformers or timm, embedded name, hf:NAME.", autocompletion=model_names
        ),
    ],
    adapters: Weighted,
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
    from svdpeft.models.language import folder_of

    quiet()
    try:
        report = folders.merge(
            folder_of(base),
            [weighted(adapter) for adapter in adapters],
            out,
            dtype=None if dtype is None else getattr(torch, dtype),
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            shard_size=shard_size,
            check_base=not no_check_base,
        )
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        fail(error)
    tell(f"{out}: {report}", {"out": str(out), "lost": report.lost}, as_json)
