"""``svdpeft report``."""

from __future__ import annotations

from typing import Annotated

import typer

from svdpeft.cli.app import app, console, fail


@app.command()
def report(
    folder: Annotated[str, typer.Argument(help="Folder of a comparison, or any address that fsspec opens.")],
) -> None:
    """Write the report of a comparison again from its runs: a page, a text, a table, pictures."""
    from svdpeft.compare import report as writer
    from svdpeft.compare.store import Store

    try:
        results = writer.write(Store(folder))
    except (ImportError, ValueError, OSError) as error:
        fail(error)
    console.print(writer.terminal(results))
    console.print(f"page: {folder}/report.html   text: {folder}/report.md   numbers: {folder}/results.csv")
