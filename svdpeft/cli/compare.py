"""``svdpeft compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from svdpeft.cli.app import (
    Accumulate,
    Clip,
    Json,
    MixedPrecision,
    Scheduler,
    TaskName,
    TaskOptions,
    Warmup,
    WeightDecay,
    app,
    console,
    fail,
    quiet,
)
from svdpeft.cli.completion import method_lists, model_names


@app.command()
def compare(
    spec: Annotated[Path | None, typer.Argument(help="TOML file; what it leaves out has defaults.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Embedded name, timm:NAME, hf:NAME or a local folder.", autocompletion=model_names),
    ] = None,
    task: TaskName = None,
    option: TaskOptions = None,
    targets: Annotated[
        list[str] | None, typer.Option(help="Layers that factored methods adapt: all-linear; as often as needed.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="lora,sorsa:gamma=0,svft:pattern=banded", autocompletion=method_lists)
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="Label that the others are tested against.")] = None,
    seeds: Annotated[str | None, typer.Option(help="0,1,2")] = None,
    confidence: Annotated[float | None, typer.Option(help="Of the intervals over seeds: 0.95.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Trainable values per method: 0.5% of the base, or a count; several: 0.5%,1%.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training split.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per forward.")] = None,
    accumulate: Accumulate = None,
    scheduler: Scheduler = None,
    warmup: Warmup = None,
    weight_decay: WeightDecay = None,
    clip: Clip = None,
    mixed_precision: MixedPrecision = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the input in pixels (vision).")] = None,
    train_size: Annotated[int | None, typer.Option(help="Training examples.")] = None,
    validation_size: Annotated[int | None, typer.Option(help="Validation examples, for the search.")] = None,
    test_size: Annotated[int | None, typer.Option(help="Test examples.")] = None,
    search: Annotated[str | None, typer.Option(help="How learning rates are found: grid or halving.")] = None,
    trials: Annotated[int | None, typer.Option(help="Learning rates tried for each method.")] = None,
    no_search: Annotated[bool, typer.Option("--no-search", help="Take each method's own learning rate.")] = False,
    snapshots: Annotated[int | None, typer.Option(help="Moments at which spectra are recorded.")] = None,
    backend: Annotated[str, typer.Option(help="What spreads the runs: local (processes) or ray.")] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Runs at once; default one per GPU, or what fits the CPU.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster.")] = None,
    tracker: Annotated[str, typer.Option(help="tensorboard, wandb, mlflow, trackio: follows the training.")] = "none",
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run programs that the model writes, in a sandbox.")
    ] = False,
    keep_adapters: Annotated[
        Literal["none", "best", "all"], typer.Option(help="Of every run, or of each method's best, in OUT/adapters.")
    ] = "none",
    out: Annotated[
        str, typer.Option(help="Folder or fsspec address; what is there is not run again.")
    ] = "runs/compare",
    as_json: Json = False,
) -> None:
    """Train methods side by side at one budget and print the table."""
    from svdpeft.compare import report
    from svdpeft.compare.reading import read_spec
    from svdpeft.compare.runner import Engine, at_once
    from svdpeft.compare.runner import compare as run_all
    from svdpeft.compare.store import Store
    from svdpeft.finetuning.words import as_number, read_values

    quiet()
    if no_search and (search or trials):
        fail(ValueError("--no-search takes each method's own rate: --search and --trials do not go with it"))
    chosen = {
        "model": model,
        "task": task,
        "targets": targets or None,
        "methods": methods,
        "baseline": baseline,
        "seeds": [as_number(seed) for seed in seeds.split(",")] if seeds else None,
        "confidence": confidence,
        "budgets": budget.split(",") if budget else None,
        "epochs": epochs,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "scheduler": scheduler,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "clip": clip,
        "mixed_precision": mixed_precision,
        "image_size": image_size,
        "search": False if no_search else {"kind": search, "trials": trials},
        "snapshots": snapshots,
    }
    sizes = {"train_size": train_size, "validation_size": validation_size, "test_size": test_size}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    try:
        options = sizes | read_values(option or []) | ({"allow_code_execution": True} if allow_code_execution else {})
        asked = read_spec(spec, options, **chosen)
        workers = at_once(asked, backend) if workers is None else workers
        records = run_all(asked, out, Engine(backend, workers, address, tracker, keep_adapters))
        results = report.write(Store(out))
    except KeyboardInterrupt:
        console.print(f"stopped; finished runs are in {out}, and the same command goes on from there")
        raise typer.Exit(130) from None
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        fail(error)
    if as_json:
        print(json.dumps(records, default=str))
    else:
        console.print(report.terminal(results))
        console.print(f"report: {out}/report.html   text: {out}/report.md   numbers: {out}/results.csv")
    if not any(map(report.finished, records)):
        raise typer.Exit(1)
