"""``svdpeft extract``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from svdpeft.cli.app import Json, app, console, fail, quiet


@app.command()
def extract(
    base: Annotated[Path, typer.Argument(help="Folder of a model, as transformers or timm writes it.")],
    tuned: Annotated[Path, typer.Argument(help="Folder of the same model, fine-tuned.")],
    out: Annotated[Path, typer.Argument(help="Folder of the new adapter.")],
    rank: Annotated[int | None, typer.Option(help="Of the adapter at every site.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead: the smallest rank that keeps this share of the difference's energy.")
    ] = None,
    targets: Annotated[
        list[str] | None, typer.Option(help="Weights that become factors: all-linear; as often as needed.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the adapter.")] = "default",
    as_json: Json = False,
) -> None:
    """Make an adapter of what distinguishes two models on the disk, tensor by tensor.

    Example: svdpeft extract llama llama-tuned difference --energy 0.9
    """
    from svdpeft import folders

    quiet()
    try:
        found = folders.extract(base, tuned, out, rank=rank, energy=energy, targets=targets or "all-linear", name=name)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        fail(error)
    if as_json:
        print(json.dumps({"out": str(out), "ranks": found.ranks, "errors": found.errors, "whole": found.whole}))
        return
    table = Table(box=None, padding=(0, 1, 0, 0))
    for title in ("site", "rank", "lost"):
        table.add_column(title, justify="left" if title == "site" else "right", no_wrap=title != "site")
    for site, error in found.errors.items():
        table.add_row(site, str(found.ranks[site]), f"{error:.2%}")
    console.print(table)
    console.print(f"{out}: {found}", soft_wrap=True, highlight=False, markup=False)
