"""The command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
console = Console()

Out = Annotated[Path, typer.Option(help="Folder of the comparison; what is there already is not run again.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.callback()
def main() -> None:
    """SVD-based parameter-efficient fine-tuning on any architecture."""


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
    out: Out = Path("runs/compare"),
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
        _fail(error)
    report.write(records, out)
    if as_json:
        print(json.dumps(records, default=str))
    else:
        console.print(report.terminal(records))
        console.print(f"report: {out / 'report.md'}   numbers: {out / 'results.csv'}   picture: {out / 'report.png'}")
    if all("error" in record for record in records):
        raise typer.Exit(1)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of a comparison.")]) -> None:
    """Write the report of a comparison again from its runs."""
    from svdpeft.compare import report as writer
    from svdpeft.compare.store import Store

    if not (folder / "runs").is_dir():
        _fail(ValueError(f"{folder} is not a comparison: it has no folder 'runs'"))
    records = Store(folder).read()
    if not records:
        _fail(ValueError(f"{folder / 'runs'} holds no run"))
    writer.write(records, folder)
    console.print(writer.terminal(records))


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, for its card.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or print one method's card."""
    import inspect

    from svdpeft.methods.base import PerSite
    from svdpeft.registry import METHODS

    if name is not None:
        try:
            cls = METHODS[name]
        except ValueError as error:
            _fail(error)
        module = inspect.getmodule(cls)
        console.print((module.__doc__ or "").strip(), markup=False, highlight=False)
        console.print("\n" + inspect.cleandoc(cls.__doc__ or ""), markup=False, highlight=False)
        return
    listed = []
    for cls in METHODS.values():
        row = {"name": cls.name, "trains": "parameters of the base", "4096x4096": None, "source": ""}
        if issubclass(cls, PerSite):
            method = cls().at("a weight", 4096, 4096)
            row |= {"trains": ", ".join(method.trains), "4096x4096": method.count(1, 4096, 4096)}
        if cls.reference is not None:
            row["source"] = f"arXiv:{cls.reference.arxiv}"
        listed.append(row)
    if as_json:
        print(json.dumps(listed))
        return
    table = Table("name", "trains", "values at 4096x4096, defaults", "source")
    for row in listed:
        size = row["4096x4096"]
        table.add_row(row["name"], row["trains"], f"{size:,}" if size else "", row["source"])
    console.print(table)


def _fail(error: Exception) -> None:
    Console(stderr=True).print(f"svdpeft: {error}", style="red", markup=False, highlight=False)
    raise typer.Exit(2)
