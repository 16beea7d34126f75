"""The command line."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Any

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
    if not any(map(report.finished, records)):
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
    from svdpeft.registry import METHODS
    from svdpeft.zoo import SIDE, card

    if name is not None:
        try:
            c = card(name)
        except ValueError as error:
            _fail(error)
        if as_json:
            print(json.dumps({**vars(c), "cls": c.cls.__name__}))
        else:
            _print_card(c)
        return
    cards = [card(each) for each in METHODS]
    if as_json:
        print(json.dumps([{**vars(c), "cls": c.cls.__name__} for c in cards]))
        return
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    table.add_column("trains", max_width=22)
    table.add_column(f"{SIDE}x{SIDE}", justify="right", no_wrap=True)
    table.add_column("start", no_wrap=True)
    table.add_column("LoRA", justify="right", no_wrap=True)
    table.add_column("works on")
    for c in cards:
        start = "exact" if c.exact_start else "off"
        values = f"{c.values:,}" if c.values else ""
        table.add_row(c.name, c.trains, values, start, str(c.export_rank or "–"), c.works)
    console.print(table)
    console.print(
        f"{SIDE}x{SIDE}: values that train at one such layer with the defaults. start: whether the model starts "
        "as the base. LoRA: rank of the plain LoRA that holds the trained adapter, – where none does. `svdpeft methods "
        "NAME` says more, also why a method is not defined on a layer kind.",
        style="dim",
        highlight=False,
    )


@app.command()
def cite(names: Annotated[list[str], typer.Argument(help="Methods, such as sorsa pissa.")]) -> None:
    """Print the BibTeX entries of methods."""
    import svdpeft

    try:
        entries = svdpeft.cite(*names)
    except ValueError as error:
        _fail(error)
    if not entries:
        _fail(ValueError(f"{', '.join(names)}: no paper to cite"))
    print(entries)  # not through rich: an entry is for a file


def _print_card(c: Any) -> None:
    """What a paper's reader wants to know of a method."""
    show = functools.partial(console.print, markup=False, highlight=False)
    show(c.title, style="bold")
    show(f"\n{c.formula}\n", soft_wrap=True)  # a formula that is broken in two is not read
    show(c.summary)
    for section in ("When to use", "Paper and code", "Args"):
        if section in c.sections:
            show(f"\n{section}", style="bold")
            show(c.sections[section].replace("\n", " " if section == "When to use" else "\n"))
    if c.works:
        show("\nAt a glance", style="bold")
        reason = next((f" ({why})" for why in c.kinds.values() if why), "")
        values = f" {c.values:,} at 4096x4096 with the defaults" if c.values else ""
        show(f"trains         {c.trains}\nvalues         {c.parameters}{values}")
        show(f"start          {'the base model, bit for bit' if c.exact_start else 'off the base model'}")
        show(f"as a LoRA      {f'of rank {c.export_rank} there' if c.export_rank else 'no'}")
        show(f"works on       {c.works}{reason}")
        show("\nCombinations", style="bold")
        for what, how in c.combines.items():
            show(f"{what}: {how}")
    if c.citation:
        show(f"\n{c.citation}")


def _fail(error: Exception) -> None:
    Console(stderr=True).print(f"svdpeft: {error}", style="red", markup=False, highlight=False)
    raise typer.Exit(2)
