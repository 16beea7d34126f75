"""``svdpeft train``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from svdpeft.cli.app import (
    Accumulate,
    Clip,
    Json,
    MixedPrecision,
    Quantize,
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
from svdpeft.cli.completion import method_names, model_names

OURS = ("spec", "resume", "dry_run", "as_json")  # of the command, and no options of a training


@app.command()
def train(
    spec: Annotated[Path | None, typer.Argument(help="TOML file with any of the options; flags override it.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Embedded, timm:NAME, hf:NAME, a folder, an RWKV file.", autocompletion=model_names),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="JSONL, CSV, Parquet or text file, a folder of these or of pictures, or hf:NAME."),
    ] = None,
    task: TaskName = None,
    option: TaskOptions = None,
    method: Annotated[
        str | None,
        typer.Option(help="One of `svdpeft methods`: sorsa:rank=128,gamma=4e-4.", autocompletion=method_names),
    ] = None,
    preserve: Annotated[
        str | None,
        typer.Option(help="Data whose outputs are to stay, for a method that starts from such, too (sc-lora)."),
    ] = None,
    targets: Annotated[list[str] | None, typer.Option(help="Layers to adapt: all-linear; as often as needed.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Layers that are left alone.")] = None,
    train: Annotated[list[str] | None, typer.Option(help="Layers or parameters that train whole.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; the method's own unless said.")] = None,
    head_lr: Annotated[float | None, typer.Option(help="Learning rate of a new classifier: that of --lr.")] = None,
    loraplus_ratio: Annotated[float | None, typer.Option(help="LoRA+: rate of L by that of A.")] = None,
    gradients: Annotated[
        str | None, typer.Option(help="Rule for the gradients of L and A: riemannian, lora-pro.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training data: 1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps in the place of --epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per forward on one device: 8.")] = None,
    accumulate: Accumulate = None,
    length: Annotated[int | None, typer.Option(help="Tokens at which a training text is cut.")] = None,
    scheduler: Scheduler = None,
    warmup: Warmup = None,
    weight_decay: WeightDecay = None,
    clip: Clip = None,
    seed: Annotated[int | None, typer.Option(help="Of initialisation, batch order and dropout: 0.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the base: float32; bfloat16, float16.")] = None,
    quantize: Quantize = None,
    mixed_precision: MixedPrecision = None,
    checkpoint_activations: Annotated[
        bool | None, typer.Option("--checkpoint-activations", help="Less memory, one more forward.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the input in pixels (vision).")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between validation losses: never.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints: never.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    svd_cache: Annotated[Path | None, typer.Option(help="Folder in which decompositions are kept.")] = None,
    tracker: Annotated[str | None, typer.Option(help="Follows it: tensorboard, wandb, mlflow, trackio.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the adapter: runs/train.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Train one method on your own data, or on a task, and write the adapter.

    svdpeft train --model smollm2-135m --data own.jsonl --method sorsa:rank=16 --out my-adapter
    """
    given = {name: value for name, value in locals().items() if value not in (None, []) and name not in OURS}
    from svdpeft.finetuning.order import read_order
    from svdpeft.finetuning.train import Training

    quiet()
    try:
        order = read_order(spec, given)
        training = Training.of(order, resume)
        first = os.environ.get("RANK", "0") == "0"  # of several processes that a launcher has started
        if first and not as_json:
            _print_plan(training.plan())
        if dry_run:
            if as_json:
                print(json.dumps(dict(training.plan())))
            return
        record = training.run(resume)
    except KeyboardInterrupt:
        console.print("stopped; --resume goes on from the last checkpoint, where --save-every wrote one")
        raise typer.Exit(130) from None
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        fail(error)
    if first:
        if as_json:
            print(json.dumps(record))
        else:
            told = f"the adapter is in {order.out}: svdpeft eval, merge and export take it, its README.md loads it"
            console.print(told, markup=False, highlight=False, soft_wrap=True)


def _print_plan(lines: list[tuple[str, str]]) -> None:
    width = max(len(what) for what, _ in lines)
    for what, how in lines:  # a pattern in brackets is no markup
        console.print(f"{what:<{width}} {how}", markup=False, highlight=False, soft_wrap=True)
