"""``svdpeft combine``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from svdpeft.cli.adapters import Base, Precision, Weighted, check_new, model_of, tell, weighted
from svdpeft.cli.app import Json, app, fail, quiet


@app.command()
def combine(
    adapters: Weighted,
    out: Annotated[Path, typer.Argument(help="New folder.")],
    base: Base = None,
    rank: Annotated[int | None, typer.Option(help="Of the new adapter; exact unless said.", min=1)] = None,
    how: Annotated[Literal["sum", "ties", "dare"], typer.Option(help="Of whole updates by a paper's formula.")] = "sum",
    density: Annotated[float, typer.Option(help="Of ties and dare: the share of entries that stays.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of dare.")] = 0,
    dtype: Precision = "float32",
    as_json: Json = False,
) -> None:
    """Make one adapter of several.

    Example: svdpeft combine math:0.7 code:0.3 both --rank 16
    """
    import svdpeft
    from svdpeft.finetuning.record import base_of

    quiet()
    try:
        check_new(out)
        pairs = [weighted(adapter) for adapter in adapters]
        model = model_of(base_of(Path(pairs[0][0]), base), dtype)
        loaded = [
            (svdpeft.load(model, path, name=f"adapter-{i}", enabled=False), weight)
            for i, (path, weight) in enumerate(pairs)
        ]
        made = svdpeft.combine(loaded, rank=rank, how=how, density=density, seed=seed)
        made.adapter.save(out)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        fail(error)
    tell(f"{out}: {made}", {"out": str(out), "lost": made.lost}, as_json)
