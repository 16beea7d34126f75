"""``svdpeft import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdpeft.cli.adapters import Precision, check_new, model_of, tell
from svdpeft.cli.app import Json, app, fail, quiet
from svdpeft.cli.completion import model_names


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="Folder that PEFT's save_pretrained has written.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    base: Annotated[
        str,
        typer.Option(help="Model that it is for: embedded, hf:NAME, timm:NAME, a folder.", autocompletion=model_names),
    ],
    dtype: Precision = "float32",
    as_json: Json = False,
) -> None:
    """Make an adapter of svdpeft of one of Hugging Face PEFT.

    Example: svdpeft import peft-lora my-adapter --base hf:HuggingFaceTB/SmolLM2-135M
    """
    import svdpeft

    quiet()
    try:
        check_new(out)
        model = model_of(base, dtype)
        made = svdpeft.import_peft(model, folder)
        made.save(out)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        fail(error)
    found = {"out": str(out), "sites": len(made.sites), "trainable": made.trainable_count}
    tell(f"{out}: {made}", found, as_json)
