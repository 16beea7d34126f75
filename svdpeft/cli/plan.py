"""``svdpeft plan``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from svdpeft.cli.app import Accumulate, Json, MixedPrecision, Quantize, app, console, fail, quiet
from svdpeft.cli.completion import method_names, model_names


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Option(
            help="Embedded, timm:NAME, hf:NAME, a folder or its config.json, an RWKV file.",
            autocompletion=model_names,
        ),
    ],
    method: Annotated[
        str, typer.Option(help="One of `svdpeft methods`: sorsa:rank=128,gamma=4e-4.", autocompletion=method_names)
    ],
    targets: Annotated[list[str] | None, typer.Option(help="Layers to adapt: all-linear; as often as needed.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Layers that are left alone.")] = None,
    train: Annotated[list[str] | None, typer.Option(help="Layers or parameters that train whole.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per forward on one device.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a text.")] = 512,
    image_size: Annotated[int | None, typer.Option(help="Side of the input in pixels (vision).")] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes of a new head, which trains whole.")] = None,
    accumulate: Accumulate = None,
    dtype: Annotated[str, typer.Option(help="Of the base: float32, bfloat16, float16.")] = "float32",
    mixed_precision: MixedPrecision = None,
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="Less memory, one more forward.")
    ] = False,
    quantize: Quantize = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw-8bit or sgd.")] = "adamw",
    devices: Annotated[int, typer.Option(help="That share the work.")] = 1,
    timed: Annotated[
        bool, typer.Option("--time/--no-time", help="Estimate the time to attach, on this machine.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Say what a training would take, from a model's configuration alone: sites, values, memory, time to attach.

    svdpeft plan --model smollm2-135m --method pissa:rank=16 --batch-size 4 --length 128
    """
    from svdpeft.finetuning import plan as planning
    from svdpeft.finetuning.order import read_method
    from svdpeft.finetuning.tracing import size_of

    quiet()
    try:
        recipe = planning.Recipe(
            lr=1.0,  # says nothing of memory
            batch_size=batch_size,
            accumulate=1 if accumulate is None else accumulate,
            mixed_precision=mixed_precision,
            checkpoint_activations=checkpoint_activations,
        )
        found = planning.plan(
            model,
            read_method(method),
            recipe,
            targets=targets,
            exclude=exclude or (),
            train=train or (),
            length=length,
            image_size=image_size,
            num_classes=num_classes,
            dtype=dtype,
            optimizer=optimizer,
            devices=devices,
            quantize=quantize,
            timed=timed,
        )
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        fail(error)
    if as_json:
        print(json.dumps(found.to_json()))
        return
    attach = "" if found.attach_seconds is None else f", {found.attach_seconds:.2g} s of computing to attach, here"
    stored = "" if quantize is None else f", its linear layers in {quantize}"
    lines = [
        ("model", f"{found.model}, {found.parameters:,} values in {dtype}{stored}"),
        ("method", f"{found.method} on {found.sites} sites{attach}"),
        (
            "trains",
            f"{found.trains:,} values, {found.trains / found.parameters:.3%} of the base; "
            f"a file of {size_of(found.adapter_bytes)}",
        ),
        ("memory", str(found.memory)),
    ]
    if devices > 1:
        each = f"{size_of(found.replicated)} each where all hold all, {size_of(found.sharded)} where weights are shared"
        lines.append(("devices", f"{devices}: {each}"))
    for what, how in lines:
        console.print(f"{what:<8}{how}", markup=False, highlight=False, soft_wrap=True)
