"""``svdpeft report``."""

from __future__ import annotations

from typing import Annotated

import typer

from svdpeft.cli.app import app, console, fail


@app.command()
def report(
    folder: Annotated[str, typer.Argument(help="Folder of a comparison, or any address that fsspec opens.")],
    metric: Annotated[
        str | None, typer.Option(help="Rank and test by another metric of the test split, such as loss.")
    ] = None,
) -> None:
    """Write the report of a comparison again from its runs: a page, a text, a table, pictures."""
    from svdpeft.compare import report as writer
    from svdpeft.compare.store import Store

    try:
        results = writer.write(Store(folder), metric)
    except (ImportError, ValueError, OSError) as error:
        fail(error)
    console.print(writer.terminal(results))
    console.print(f"page: {folder}/report.html   text: {folder}/report.md   numbers: {folder}/results.csv")
