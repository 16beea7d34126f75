"""``svdpeft inspect``."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from svdpeft.cli.app import Json, app, console, fail, quiet
from svdpeft.cli.completion import model_names

if TYPE_CHECKING:
    from svdpeft.adapter.adapter import Adapter
    from svdpeft.analysis import Inspection
    from svdpeft.models import Loaded

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
WEIGHT = ("site", "shape", "σ₁", "σ₁/σ_K", "effective\nrank", "stable\nrank")
ADAPTED = ("site", "ΔΣ", "ΔD", "ΔD\nassigned", "‖ΔW‖\n/ ‖W‖", "intru-\nders", "overlap\nu", "overlap\nv", "‖QᵀQ−I‖")


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="Embedded name, timm:NAME, hf:NAME, a local folder or an RWKV file.", autocompletion=model_names
        ),
    ],
    targets: Annotated[
        str, typer.Option(help='Weights to look at, as attach() takes them: "q_proj|v_proj", "all-linear".')
    ] = "all",
    energy: Annotated[float, typer.Option(help="Share of the energy ‖W‖² that a rank has to keep.")] = 0.9,
    adapter: Annotated[Path | None, typer.Option(help="A saved adapter: what it has done to its weights.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes of the adapter's own head (vision).")] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the weights: an adapter needs the one that it was made on.")
    ] = "float32",
    csv: Annotated[Path | None, typer.Option(help="Write the numbers of every site.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the energy by rank (.png, .svg, .pdf), with a .csv.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the spectra of a model's weights: condition, effective rank, which rank keeps 90 % of the energy."""
    import torch

    from svdpeft import analysis, models
    from svdpeft.analysis.plots import check_picture
    from svdpeft.analysis.tables import check_file

    quiet()
    progress = functools.partial(
        track, description="decomposing", console=Console(stderr=True), transient=True, disable=as_json
    )
    try:
        if csv is not None:
            check_file(csv)
        if picture is not None:
            check_picture(picture)
            if csv is not None and csv.resolve() == picture.with_suffix(".csv").resolve():
                raise ValueError(f"{csv} is where the numbers of {picture} go: give --csv another name")
        loaded = models.load(model, num_classes=num_classes, dtype=getattr(torch, dtype))
        what = loaded.model if adapter is None else _attached(loaded, adapter, num_classes)
        found = analysis.inspect(what, targets, energy, progress)
        if csv is not None:
            found.to_csv(csv)
        if picture is not None:
            analysis.plot_energy(found, picture, energy)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        fail(error)
    if as_json:
        print(json.dumps({"model": model, "adapter": None if adapter is None else str(adapter), **found.to_json()}))
        return
    _print(found, model)
    if adapter is not None:
        _print_adapted(found, adapter)


def _attached(loaded: Loaded, adapter: Path, num_classes: int | None) -> Adapter:
    """Load the adapter; where it does not fit, say first which option of this command makes it fit."""
    import svdpeft
    from svdpeft.adapter.file import CheckpointError

    try:
        return svdpeft.load(loaded.model, adapter)
    except CheckpointError as error:
        text = str(error)
        if error.dtype:
            raise ValueError(f"give --dtype {error.dtype}, which {adapter} was made on: {text}") from error
        other = re.search(r" trains \S+, which this model does not have| there, .* in this model$", text)
        if other and num_classes is None and loaded.modality == "vision":
            what = text[: other.end()]  # without all the names that the model has
            raise ValueError(f"give --num-classes if the adapter has a head of its own: {what}") from error
        raise


def _print(found: Inspection, model: str) -> None:
    table = Table(title=model, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in (*WEIGHT, f"rank for\n{100 * found.energy:g}% energy"):
        _add_column(table, heading)
    for row in found.table:
        times = f"{row['matrices']} x " if row["matrices"] > 1 else ""
        full = min(row["m"], row["n"])
        table.add_row(
            Text(row["site"]),
            f"{times}{row['m']}x{row['n']}",
            *(_number(row[key]) for key in ("sigma_max", "condition", "effective_rank", "stable_rank")),
            f"{row['energy_rank']} ({row['energy_rank'] / full:.0%})",
        )
    console.print(table)


def _print_adapted(found: Inspection, adapter: Path) -> None:
    table = Table(title=Text(str(adapter)), title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in ADAPTED:
        _add_column(table, heading)
    keys = ("delta_sigma", "delta_d", "delta_d_assigned", "distance", "intruders", "overlap_left", "overlap_right")
    for row in found.table:
        table.add_row(Text(row["site"]), *(_number(row.get(key)) for key in (*keys, "orthonormality")))
    console.print(table)


def _add_column(table: Table, heading: str) -> None:
    name = heading == "site"  # a long one is folded, numbers stay in one piece
    table.add_column(heading, justify="left" if name else "right", overflow="fold", no_wrap=not name)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
