"""What the commands share: the application, the console, common options, how a user's mistake is told."""

from __future__ import annotations

from typing import Annotated, NoReturn

import typer
from rich.console import Console

import svdpeft
from svdpeft.cli.completion import task_names

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
TaskName = Annotated[
    str | None,
    typer.Option(
        help="Of the model's modality: mnist5k, images, cifar100, food101, flowers102, resisc45; wordproblems, gsm8k, "
        "math, humaneval, text, classification.",
        autocompletion=task_names,
    ),
]
Accumulate = Annotated[int | None, typer.Option(help="Forwards per optimizer step: 1.", min=1)]
Scheduler = Annotated[str | None, typer.Option(help="Of the rate: cosine; linear, constant, …")]
Warmup = Annotated[float | None, typer.Option(help="Share of the steps, or their number: 0.1.")]
WeightDecay = Annotated[float | None, typer.Option(help="Of AdamW: 0.")]
Clip = Annotated[float | None, typer.Option(help="Norm that gradients are clipped to: 1; 0: none.")]
MixedPrecision = Annotated[str | None, typer.Option(help="bf16 or fp16 autocast, or tf32 products.")]
Quantize = Annotated[
    str | None, typer.Option(help="How the base is stored: nf4, fp4, int8, torchao-int8, torchao-int4.")
]
TaskOptions = Annotated[list[str] | None, typer.Option(help="Of the task: name=value; as often as needed.")]


def _version(asked: bool) -> None:
    if asked:
        print(svdpeft.__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """SVD-based parameter-efficient fine-tuning on any architecture."""


def quiet() -> None:
    """Keep what transformers says while it loads out of the way: the output is the command's own."""
    import transformers  # here, so that the command line starts light

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def fail(error: Exception) -> NoReturn:
    """Print what is wrong, in one line and without a traceback, and exit with 2."""
    Console(stderr=True).print(f"svdpeft: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)
