"""Rows of one's own: a file, a folder or a data set of the hub, and the part of them that is held out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from svdpeft.models import Loaded
from svdpeft.registry import near_miss
from svdpeft.tasks.base import SPLITS, SplitName, Task, whole
from svdpeft.tasks.corpora import Row, files, hold_out, read, rows

VALIDATION = ("validation", "valid", "val", "dev")
SHARE, MOST = 20, 500  # one row in so many is held out, and at most so many
HUB = "hf:"


@dataclass(frozen=True)
class OwnTask(Task):
    """Abstract: a task on rows of one's own.

    Validation rows are those of a published split, else rows that are held out from the end of the training data and
    share no text with the rest. They are the same at every seed.

    Args:
        train_size: number of training rows, the first ones; ``None`` takes all.
        validation_size: the same of the validation rows; ``None`` takes all of a published split, and else holds out
            one row in 20, at most 500.
        test_size: number of test rows; ``None`` takes all.
        data: a file (``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``, ``.txt``), a folder in which file or
            folder names say the split, or ``"hf:NAME"``, of the hub.
    """

    train_size: int | None = None  # type: ignore[assignment]
    validation_size: int | None = None  # type: ignore[assignment]
    test_size: int | None = None  # type: ignore[assignment]
    data: str = field(kw_only=True)

    modality: ClassVar[Literal["vision", "language"]] = "language"

    def __post_init__(self) -> None:
        if not isinstance(self.data, str) or not self.data:
            raise ValueError(f"data {self.data!r} of task {self.name!r} is no file, folder or name of the hub")
        for split in SPLITS:
            size = getattr(self, f"{split}_size")
            if size is not None and not (whole(size) and size >= 1):
                raise ValueError(f"{split}_size {size!r} of task {self.name!r} is no whole number of at least 1")

    def key(self, row: Row) -> str:
        """The text of a row, of which no two parts of the data have the same."""
        raise NotImplementedError

    def published(self, split: str) -> list[Row]:
        """The rows of a split that is there.

        Raises:
            OSError, ValueError: it is not.
        """
        if self.data.startswith(HUB):
            return rows(None, split, self.data.removeprefix(HUB), option="data")
        path = Path(self.data).expanduser()
        if path.is_file() and split != "train":
            raise FileNotFoundError(
                f"{path} is one file: it has no {split} split, which a folder can have; its validation split "
                "are the rows that training holds out"
            )
        return [row for file in files(path, split) for row in read(file)]

    def read(self, loaded: Loaded, splits: Collection[SplitName]) -> dict[str, list[Row]]:
        """The rows of these splits.

        Raises:
            OSError: a split is not there.
            ValueError: a size is larger than what there is.
        """
        if loaded.modality != self.modality:
            self.check(loaded)
        found: dict[str, list[Row]] = {}
        if "test" in splits:
            found["test"] = self.published("test")
        if "train" in splits or "validation" in splits:
            train = self.published("train")
            if not train:
                raise ValueError(f"{self.data} has no rows")
            held = self._validation()
            if held is None:
                size = self.validation_size or max(min(len(train) // SHARE, MOST), 1)
                if size >= len(train):
                    raise ValueError(f"validation_size {size} leaves nothing of the {len(train)} rows of {self.data}")
                train, held = hold_out(train, size, lambda row: [self.key(row)])
                if not train:
                    raise ValueError(f"the rows of {self.data} all have one text: held out, it leaves none to train on")
            found["train"], found["validation"] = train, held
        return {split: self._front(split, found[split]) for split in SPLITS if split in splits}

    def _validation(self) -> list[Row] | None:
        for name in VALIDATION:
            try:
                return self.published(name)
            except OSError:
                continue
        return None

    def _front(self, split: str, found: Sequence[Row]) -> list[Row]:
        size = getattr(self, f"{split}_size")
        if size is not None and size > len(found):
            raise ValueError(f"{split}_size {size} is outside [1, {len(found)}], the {split} rows of {self.data}")
        return list(found[:size])


def column(found: Sequence[Row], asked: str | None, usual: Sequence[str], what: str, where: str) -> str:
    """The name of a column: the one that was asked for, else the first usual one that is there.

    Args:
        found: rows.
        asked: by the user.
        usual: names that such a column goes by.
        what: the option that names it, for messages.
        where: the rows are from.

    Raises:
        ValueError: no such column, or a row without it.
    """
    known = list(found[0])
    name = asked if asked is not None else next((each for each in usual if each in known), None)
    if name is None:
        raise ValueError(f"{where} has the columns {', '.join(known)}: say which it is, {what}=COLUMN")
    for i, row in enumerate(found, 1):
        if row.get(name) is None:
            missing = f"has no column {name!r}" if name not in row else f"has nothing in column {name!r}"
            raise ValueError(f"row {i} of {where} {missing}: {near_miss(name, row)}; {what}= names it")
    return name
