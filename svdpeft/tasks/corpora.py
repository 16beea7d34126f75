"""Rows of a data set: from local files, or from the hub through ``datasets``; and a part of them held out."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from svdpeft.registry import near_miss

Row = dict[str, Any]
SPLITS = {"train", "validation", "valid", "val", "dev", "test"}
TABLES = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".json", ".jsonl", ".parquet", *TABLES, ".txt")


def rows(
    path: str | Path | None, split: str, hub: str, configs: Sequence[str | None] = (None,), *, option: str
) -> list[Row]:
    """Read one split of a data set.

    Args:
        path: a local file, or a folder in which file or folder names say the split; ``None``: from the hub.
        split: ``"train"`` or ``"test"``.
        hub: name on the hub.
        configs: its configurations, read one after the other.
        option: the task's option that takes ``path``, for the messages.

    Raises:
        FileNotFoundError: no such file, or no file of the split.
        ValueError: a file that cannot be read, or ``path`` is no path.
        ImportError: the hub, or a parquet file, is asked for without ``datasets``.
        OSError: the hub gives nothing.
    """
    if not isinstance(path, str | Path | None):
        raise ValueError(f"{option} {path!r} is no path of a file or folder")
    if path is None:
        return [row for config in configs for row in _from_hub(hub, config, split, option)]
    return [row for file in files(Path(path), split) for row in read(file)]


def _from_hub(name: str, config: str | None, split: str, option: str) -> list[Row]:
    local = f"or give a local copy: {option}=FOLDER"
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ImportError(f'{name} comes from the hub by `datasets`: pip install "svdpeft[data]", {local}') from error
    try:
        return datasets.load_dataset(name, config, split=split).to_list()  # type: ignore[union-attr]
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise OSError(f"{name} cannot be had from the hub ({type(error).__name__}: {error}); {local}") from error


def files(path: Path, split: str) -> list[Path]:
    """The files of one split: the file itself; in a folder those that are named after the split.

    A folder's ``train.jsonl`` alone is taken where it is; else every file with the word in its name or in that of its
    folder, such as ``train-00000-of-00001.parquet``, ``algebra_train.jsonl``, ``train/algebra/1.json``. Files that name
    no split at all are training data.

    Raises:
        FileNotFoundError: nothing is there, or nothing of this split.
        ValueError: the files are of several formats, perhaps the same rows twice.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no file or folder {str(path)!r} (looked for the {split} split)")
    every = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())

    def words(file: Path) -> set[str]:
        return set(re.split(r"[^a-z0-9]+", str(file.relative_to(path)).lower()))

    found = [file for file in every if file.parent == path and file.stem == split]
    found = found or [file for file in every if split in words(file)]
    if not found and split == "train":
        found = [file for file in every if not words(file) & SPLITS]
    if not found:
        names = ", ".join(str(file.relative_to(path)) for file in every[:10])
        raise FileNotFoundError(
            f"no {split} split in {str(path)!r}: no {', '.join(SUFFIXES)} file with {split!r} in its name; there: "
            f"{names or 'none'}"
        )
    if len(suffixes := {file.suffix for file in found}) > 1:
        raise ValueError(
            f"the {split} split in {str(path)!r} is there as {' and '.join(sorted(suffixes))}: name one file"
        )
    return found


def read(file: Path) -> list[Row]:
    """Rows of a JSON list, of one JSON object, of JSON lines, of a table, or of a text, whose lines are its rows.

    Raises:
        ValueError: not JSON, or no table, with the line; rows that are no objects; a file of another kind.
        ImportError: a parquet file without ``datasets``.
    """
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file} is none of {', '.join(SUFFIXES)}")
    if file.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ImportError(f'{file} is parquet: pip install "svdpeft[data]"') from error
        return parquet.read_table(file).to_pylist()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}") from error
    if file.suffix == ".txt":
        return [{"text": line} for line in text.splitlines() if line.strip()]
    if file.suffix in TABLES:
        return _table(file, text)
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = [_line(file, i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    found = found if isinstance(found, list) else [found]
    for i, row in enumerate(found, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{file}: row {i} is no JSON object but a {type(row).__name__}")
    return found


def _table(file: Path, text: str) -> list[Row]:
    """The rows of a table whose first row names its columns."""
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=TABLES[file.suffix], strict=True)
    found: list[Row] = []
    try:
        for row in reader:
            if None in row or None in row.values():
                cells = len(row) - (None in row) - list(row.values()).count(None) + len(row.get(None) or ())
                names = reader.fieldnames or ()
                raise ValueError(
                    f"{file}, line {reader.line_num}: {cells} cells, and the first row names {len(names)} columns: "
                    f"{', '.join(names)}"
                )
            found.append(row)
    except csv.Error as error:
        raise ValueError(f"{file}, the row from line {reader.line_num + 1} on: {error}") from error
    return found


def _line(file: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {number}: {error}") from error


def need(found: Sequence[Row], fields: Iterable[str], where: str) -> None:
    """Refuse rows without one of the fields, with the near miss.

    Raises:
        ValueError: there is no row, or one lacks a field.
    """
    if not found:
        raise ValueError(f"{where} has no rows")
    for i, row in enumerate(found, 1):
        for field in fields:
            if row.get(field) is None:
                raise ValueError(f"row {i} of {where} has no field {field!r}: {near_miss(field, row)}")


def normal(text: str) -> str:
    """A text without case and runs of white space: what makes two questions the same."""
    return " ".join(text.split()).casefold()


def hold_out(
    found: Sequence[Row],
    size: int,
    keys: Callable[[Row], Iterable[str]],
    eligible: Callable[[Row], bool] = lambda row: True,
    never: Iterable[str] = (),
) -> tuple[list[Row], list[Row]]:
    """Split rows into training and validation, which share no question in any wording.

    Validation is the last ``size`` eligible rows, no two of which share a key; what shares a key with one of them, or
    with ``never``, is in neither part. It depends on nothing but the rows.

    Args:
        found: the rows, in their order.
        size: number of validation rows.
        keys: texts of a row, of which two rows share one if they are the same question: the question itself, and the
            one that it rephrases.
        eligible: which rows validation may take.
        never: texts that must be in neither part: the test questions.

    Returns:
        Training rows, validation rows, both in their order.

    Raises:
        ValueError: there are fewer than ``size`` such rows.

    Example:
        >>> data = [{"q": "a", "of": "a"}, {"q": "b", "of": "b"}, {"q": "a again", "of": "a"}, {"q": "c", "of": "c"}]
        >>> hold_out(data[:3], 1, lambda row: row.values())
        ([{'q': 'b', 'of': 'b'}], [{'q': 'a again', 'of': 'a'}])
    """
    tested = {normal(text) for text in never}
    held: set[str] = set()
    chosen: list[Row] = []
    for row in reversed(found):
        if len(chosen) == size:
            break
        mine = {normal(text) for text in keys(row)}
        if not mine & (tested | held) and eligible(row):
            held |= mine
            chosen.append(row)
    if len(chosen) < size:
        raise ValueError(
            f"validation_size {size} is outside [1, {len(chosen)}]: questions of the training data to hold out"
        )
    out = tested | held
    return [row for row in found if not out & {normal(text) for text in keys(row)}], chosen[::-1]
