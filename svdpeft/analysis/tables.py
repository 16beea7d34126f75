"""Tables of numbers: rows (a mapping per site, or per step and site), as CSV, and as columns of a run's record."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svdpeft.atomic import replacing

Row = dict[str, Any]
Spectra = Mapping[str, Any]  # {"steps": […], "sites": […], column: [[of each site] of each step]}
Table = Sequence[Row] | Spectra


def to_columns(rows: Sequence[Row], columns: Sequence[str]) -> dict[str, Any]:
    """Return rows of (step, site) as columns, ``[step][site]``: shorter, and what a run's record holds.

    Example:
        >>> to_columns([{"step": 0, "site": "q", "size": 1.0}, {"step": 5, "site": "q", "size": 2.0}], ["size"])
        {'steps': [0, 5], 'sites': ['q'], 'size': [[1.0], [2.0]]}
    """
    steps = list(dict.fromkeys(row["step"] for row in rows))
    sites = list(dict.fromkeys(row["site"] for row in rows))
    at = {(row["step"], row["site"]): row for row in rows}
    values = {column: [[at[step, site][column] for site in sites] for step in steps] for column in columns}
    return {"steps": steps, "sites": sites, **values}


def to_rows(table: Table) -> list[Row]:
    """The inverse of ``to_columns``; rows stay as they are."""
    if not isinstance(table, Mapping):
        return list(table)
    columns = [column for column in table if column not in ("steps", "sites")]
    return [
        {"step": step, "site": site, **{column: table[column][i][j] for column in columns}}
        for i, step in enumerate(table["steps"])
        for j, site in enumerate(table["sites"])
    ]


def check_file(path: str | os.PathLike[str]) -> Path:
    """Refuse a file that cannot be written before the work whose result it is to hold.

    Raises:
        OSError: the path is a folder, or lies in none.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: a file is written here")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    return path


def write_csv(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Write rows with a header; what is undefined is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as new:
        new.write_text(text.getvalue())
