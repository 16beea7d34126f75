"""``svdpeft decompose``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from svdpeft.cli.app import Json, app, console, fail, quiet


@app.command()
def decompose(
    folder: Annotated[Path, typer.Argument(help="Folder of a model, as transformers or timm writes it.")],
    rank: Annotated[int, typer.Option(help="That attach() will be given.")],
    cache: Annotated[Path, typer.Option(help="Folder of the cache, for svdpeft.svd_cache; what is there is kept.")],
    targets: Annotated[
        list[str] | None, typer.Option(help="Weights, as attach() takes them: all-linear; as often as needed.")
    ] = None,
    seed: Annotated[int, typer.Option(help="That attach() will be given.")] = 0,
    as_json: Json = False,
) -> None:
    """Compute the SVDs of a model on the disk, weight by weight; stopped, the same command goes on from there.

    Example: svdpeft decompose llama --rank 16 --cache svd
    """
    from svdpeft import folders

    quiet()
    try:
        found = folders.decompose(folder, rank, cache, targets or None, seed)
    except KeyboardInterrupt:
        console.print(f"stopped; what is done is in {cache}, and the same command goes on from there")
        raise typer.Exit(130) from None
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        fail(error)
    if as_json:
        print(json.dumps({"cache": str(cache), "sites": found.sites, "computed": found.computed}))
    else:
        console.print(f"{cache}: {found}", soft_wrap=True, highlight=False, markup=False)
