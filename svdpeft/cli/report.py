"""``svdpeft report``."""

from __future__ import annotations

from svdpeft.cli.app import Folder, app, console, fail


@app.command()
def report(folder: Folder) -> None:
    """Write the report of a comparison again from its runs."""
    from svdpeft.compare import report as writer
    from svdpeft.compare.store import Store

    if not (folder / "runs").is_dir():
        fail(ValueError(f"{folder} is not a comparison: it has no folder 'runs'"))
    records = Store(folder).read()
    if not records:
        fail(ValueError(f"{folder / 'runs'} holds no run"))
    writer.write(records, folder)
    console.print(writer.terminal(records))
