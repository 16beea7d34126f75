"""Classes of one's own texts: a new classifier on a language model, judged by its accuracy."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from svdpeft.models import Loaded
from svdpeft.registry import TASKS, near_miss
from svdpeft.tasks.base import SPLITS, SplitName, TaskData, Unread, evaluating, whole
from svdpeft.tasks.corpora import Row
from svdpeft.tasks.generation import pad, pad_token, positions
from svdpeft.tasks.own import OwnTask, column

TEXTS, LABELS = ("text", "sentence", "content", "review"), ("label", "class", "category")
BATCH = 64  # texts of one forward when a model is judged


class Labelled(Dataset[dict[str, Tensor]]):
    """Texts with their classes: ``{"input_ids": (T,), "labels": ()}``."""

    def __init__(self, ids: list[list[int]], labels: list[int]) -> None:
        self.ids, self.labels = [torch.tensor(row) for row in ids], torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


@TASKS.register("classification")
@dataclass(frozen=True)
class Classification(OwnTask):
    """One class per text; accuracy in [0, 1], and the loss in nats.

    Args:
        text: column of the text; ``None``: text, sentence, content or review, what is there first.
        label: column of the class, words or numbers; ``None``: label, class or category. The classes are those of the
            training rows, in alphabetical, or numerical, order.
        max_length: tokens of a text; the end of what is longer is cut off, everywhere. ``None``: what the model reads.
    """

    text: str | None = None
    label: str | None = None
    max_length: int | None = None

    metric: ClassVar[str] = "accuracy"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and not (whole(self.max_length) and self.max_length >= 2):
            raise ValueError(f"max_length {self.max_length!r} of task {self.name!r} is no whole number of at least 2")

    def key(self, row: Row) -> str:
        return str(next((row[name] for name in (self.text, *TEXTS) if name in row), row))

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of classes; reads the training rows."""
        return len(classes(self))

    def prepare(self, loaded: Loaded, seed: int = 0, splits: Collection[SplitName] = SPLITS) -> TaskData:
        """Tokenise the texts for this model.

        Raises:
            ValueError: a vision model, one without classifier or tokenizer, no such column, an unknown class.
            OSError: the data are not there.
        """
        found, tokenizer = self.read(loaded, splits), loaded.processor
        if tokenizer is None or loaded.head is None:
            raise ValueError(f"task {self.name!r} needs a tokenizer and a classifier; {loaded.name!r} has not both")
        numbers = {value: i for i, value in enumerate(classes(self))}
        config: Any = loaded.model.config
        room = self.max_length or positions(loaded.model) or getattr(config, "max_position_embeddings", None)
        data: dict[str, Dataset[Any]] = dict.fromkeys(SPLITS, Unread())
        for split, rows in found.items():
            where = f"the {split} split of {self.data}"
            text = column(rows, self.text, TEXTS, "text", where)
            label = column(rows, self.label, LABELS, "label", where)
            for i, row in enumerate(rows, 1):
                if row[label] not in numbers:
                    raise ValueError(f"row {i} of {where} has the class {row[label]!r}, which no training row has")
            cut = {"truncation": True, "max_length": room} if room is not None else {}
            ids = tokenizer([str(row[text]) for row in rows], **cut).input_ids
            data[split] = Labelled(ids, [numbers[row[label]] for row in rows])
        padding = pad_token(tokenizer)

        def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            ids = [example["input_ids"] for example in examples]
            mask = pad([torch.ones_like(row) for row in ids], 0)
            labels = torch.stack([example["labels"] for example in examples])
            return {"input_ids": pad(ids, padding), "attention_mask": mask, "labels": labels}

        def evaluate(model: nn.Module, examples: Any, metrics: Collection[str] = ()) -> dict[str, list[float]]:
            told: dict[str, list[float]] = {"accuracy": [], "loss": []}
            for name in metrics:
                if name not in told:
                    raise ValueError(f"task {self.name!r} has no metric {name!r}: {near_miss(name, told)}")
            with evaluating(model) as device:
                for start in range(0, len(examples), BATCH):
                    batch = collate([examples[i] for i in range(start, min(start + BATCH, len(examples)))])
                    labels = batch.pop("labels").to(device)
                    logits = model(**{name: value.to(device) for name, value in batch.items()}).logits.float()
                    told["accuracy"] += (logits.argmax(-1) == labels).float().tolist()
                    told["loss"] += F.cross_entropy(logits, labels, reduction="none").tolist()
            return {name: values for name, values in told.items() if not metrics or name in metrics}

        return TaskData(**data, collate=collate, evaluate=evaluate)


def classes(task: Classification) -> tuple[Any, ...]:
    """What the labels of the training rows are, in alphabetical or numerical order."""
    return _classes(task, Path.cwd())


@lru_cache(maxsize=8)
def _classes(task: Classification, folder: Path) -> tuple[Any, ...]:
    """``folder`` is where a relative path begins."""
    rows, where = task.published("train"), f"the train split of {task.data}"
    if not rows:
        raise ValueError(f"{where} has no rows")
    name = column(rows, task.label, LABELS, "label", where)
    found = {row[name] for row in rows}
    if len(found) < 2:
        raise ValueError(f"column {name!r} of {where} has one class, {min(map(str, found))!r}: nothing to tell apart")
    return tuple(sorted(found, key=lambda value: (isinstance(value, str), value)))
