"""``svdpeft export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from svdpeft.cli.adapters import Base, opened, tell
from svdpeft.cli.app import Json, app, fail, quiet


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter.")],
    out: Annotated[Path, typer.Argument(help="New folder, or file for gguf.")],
    to: Annotated[Literal["peft", "gguf"], typer.Option(help="PEFT's folder, or llama.cpp's file.")] = "peft",
    base: Base = None,
    max_rank: Annotated[
        int | None, typer.Option(help="The nearest update of this rank; exact unless said.", min=1)
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Of the model's weights, where they cannot stay on the disk."),
    ] = "float32",
    as_json: Json = False,
) -> None:
    """Write an adapter as a LoRA that PEFT, vLLM or llama.cpp load.

    Example: svdpeft export my-adapter my-lora --to peft --max-rank 16
    """
    import svdpeft
    from svdpeft.finetuning.record import base_of

    quiet()
    try:
        held = opened(base_of(adapter, base), adapter, dtype)
        if to == "gguf":
            ranks = svdpeft.export_gguf(held, out, max_rank=max_rank)
            told = f"{out}: LoRA of {len(ranks)} weights, rank {min(ranks.values())} to {max(ranks.values())}"
            found: dict[str, Any] = {"out": str(out), "ranks": ranks}
        else:
            written = svdpeft.export_lora(held, out, max_rank=max_rank)
            told, found = str(written), {"out": str(out), "ranks": written.ranks, "lost": written.lost}
            found["notes"] = written.notes
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        fail(error)
    tell(told, found, as_json)
