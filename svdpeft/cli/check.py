"""``svdpeft check``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from svdpeft.cli.app import Json, app, console


@app.command()
def check(
    paths: Annotated[list[Path], typer.Argument(help="Adapters, trainings, caches of SVDs: their folders.")],
    as_json: Json = False,
) -> None:
    """Say whether adapters, and caches of SVDs, have the bits that were written; exit with 1 where one has not.

    Example: svdpeft check my-adapter svd
    """
    found = {str(path): _told(path) for path in paths}
    if as_json:
        print(json.dumps([{"path": path, "whole": whole, "told": told} for path, (whole, told) in found.items()]))
    else:
        for path, (whole, told) in found.items():
            console.print(
                f"{path}: {told}", style=None if whole else "red", soft_wrap=True, highlight=False, markup=False
            )
    if not all(whole for whole, _ in found.values()):
        raise typer.Exit(1)


def _told(path: Path) -> tuple[bool, str]:
    """Whether something is as it was written, and what it is or what is wrong with it."""
    from svdpeft.adapter.file import TENSORS, read
    from svdpeft.decomposition import damaged
    from svdpeft.folders.folder import CONFIG

    if (path / CONFIG).exists() and not (path / TENSORS).exists():
        return False, "a model, with whose tensors no digests were written: these are of adapters and caches of SVDs"
    kept = {} if (path / TENSORS).exists() or not path.is_dir() else damaged(path)
    if kept:
        wrong = [f"{name}: {why}" for name, why in kept.items() if why]
        return not wrong, "; ".join(wrong) or f"{len(kept)} decomposition{'s' * (len(kept) > 1)}, as written"
    try:
        header, tensors, _ = read(path, verify=True)
    except (ValueError, OSError) as error:
        return False, str(error)
    sites = len(header["sites"])
    return True, f"adapter {header['name']!r}, {sites} site{'s' * (sites != 1)}, {len(tensors)} tensors, as written"
