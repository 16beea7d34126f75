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
    folder: Annotated[Path, typer.Argument(help="Folder of PEFT, or of SORSA's own package.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    base: Annotated[
        str,
        typer.Option(help="Model that it is for: embedded, hf:NAME, timm:NAME, a folder.", autocompletion=model_names),
    ],
    dtype: Precision = "float32",
    as_json: Json = False,
) -> None:
    """Make an adapter of svdpeft of one of Hugging Face PEFT, or of a checkpoint of SORSA's own package.

    Example: svdpeft import peft-lora my-adapter --base hf:HuggingFaceTB/SmolLM2-135M
    """
    import svdpeft
    from svdpeft.interop.peft_folder import CONFIG

    quiet()
    try:
        check_new(out)
        model = model_of(base, dtype)
        peft = (folder / CONFIG).is_file() or not (folder / "config.json").is_file()
        made = (svdpeft.import_peft if peft else svdpeft.import_sorsa)(model, folder)
        made.save(out)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        fail(error)
    found = {"out": str(out), "sites": len(made.sites), "trainable": made.trainable_count}
    tell(f"{out}: {made}", found, as_json)
