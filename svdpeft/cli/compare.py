"""``svdpeft compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from svdpeft.cli.app import Json, app, console, fail


@app.command()
def compare(
    spec: Annotated[Path | None, typer.Argument(help="TOML file; what it leaves out has defaults.")] = None,
    model: Annotated[str | None, typer.Option(help="Embedded name, timm:NAME, hf:NAME or a local folder.")] = None,
    task: Annotated[str | None, typer.Option(help="mnist5k (vision) or wordproblems (language).")] = None,
    methods: Annotated[str | None, typer.Option(help="lora,sorsa:gamma=0,svft:pattern=banded")] = None,
    seeds: Annotated[str | None, typer.Option(help="0,1,2")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Trainable values per method: 0.5% of the base, or a count.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training split.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the input in pixels (vision).")] = None,
    train_size: Annotated[int | None, typer.Option(help="Training examples.")] = None,
    test_size: Annotated[int | None, typer.Option(help="Test examples.")] = None,
    out: Annotated[Path, typer.Option(help="Folder; what is there already is not run again.")] = Path("runs/compare"),
    as_json: Json = False,
) -> None:
    """Train methods side by side at one budget and print the table."""
    import transformers

    from svdpeft.compare import report
    from svdpeft.compare.runner import compare as run_all
    from svdpeft.compare.spec import read_spec

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {
        "model": model,
        "task": task,
        "methods": methods,
        "seeds": [int(seed) for seed in seeds.split(",")] if seeds else None,
        "budget": budget,
        "epochs": epochs,
        "batch_size": batch_size,
        "image_size": image_size,
    }
    sizes = {"train_size": train_size, "test_size": test_size}
    try:
        chosen = read_spec(spec, sizes={k: v for k, v in sizes.items() if v is not None}, **options)
        records = run_all(chosen, out)
    except KeyboardInterrupt:
        console.print(f"stopped; finished runs are in {out}, and the same command goes on from there")
        raise typer.Exit(130) from None
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)
    report.write(records, out)
    if as_json:
        print(json.dumps(records, default=str))
    else:
        console.print(report.terminal(records))
        console.print(f"report: {out / 'report.md'}   numbers: {out / 'results.csv'}   picture: {out / 'report.png'}")
    if not any(map(report.finished, records)):
        raise typer.Exit(1)
