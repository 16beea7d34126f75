"""A task: data, collation and metric. One file per task; a task knows nothing of methods or adapters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from svdpeft.models import Loaded
from svdpeft.registry import TASKS

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


class Evaluate(Protocol):
    """Judge a model example by example; a metric's value is the mean over the examples."""

    def __call__(
        self, model: nn.Module, examples: Dataset[Any], metrics: Collection[str] = ()
    ) -> dict[str, list[float]]: ...


def higher_is_better(metric: str) -> bool:
    """Whether more is better: of everything but a loss.

    Example:
        >>> higher_is_better("accuracy"), higher_is_better("loss")
        (True, False)
    """
    return not metric.endswith("loss")


class Unread(Dataset[Any]):
    """Stands for a split that was not asked for; nothing of it was read."""

    def __getitem__(self, index: int) -> Any:
        raise LookupError(f"this split was not prepared: name it in prepare(…, splits={SPLITS})")


def whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number; a truth is none.

    Example:
        >>> whole(3), whole(3.0), whole(True)
        (True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class TaskData:
    """A task made ready for one model: what a trainer needs, and how the result is judged.

    Args:
        train: training examples, a map-style data set (has a length).
        validation: examples on which choices are made (a learning rate); disjoint from ``train`` and ``test``.
        test: held-out examples, looked at once.
        collate: list of examples -> batch, a dict of tensors with the targets under ``labels``.
        evaluate: ``evaluate(model, examples, metrics)`` -> one number per example, in their order, by metric;
            ``examples`` is one of the splits; ``metrics`` says which to compute, all of the task's where it is empty.
            The training mode stays as it was.

    A split that ``prepare`` was not asked for is ``Unread``.
    """

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    collate: Callable[[list[Any]], dict[str, Tensor]]
    evaluate: Evaluate

    def __post_init__(self) -> None:
        for split in SPLITS:
            data = getattr(self, split)
            if isinstance(data, Sized) and len(data) == 0:
                raise ValueError(f"the task's {split} split is empty: nothing to {split} on")


@dataclass(frozen=True)
class Task(ABC):
    """Hyper-parameters of a task, a frozen dataclass like a method's.

    Args:
        train_size: number of training examples taken.
        validation_size: number of validation examples taken.
        test_size: number of test examples taken.
    """

    train_size: int
    validation_size: int
    test_size: int

    name: ClassVar[str]
    modality: ClassVar[Literal["vision", "language"]]
    metric: ClassVar[str]  # what a comparison ranks by
    metrics: ClassVar[tuple[str, ...]]  # all that ``evaluate`` gives, ``metric`` among them
    num_classes: ClassVar[int | None] = None  # size of a new classification head; None keeps the model's own

    @classmethod
    def on_validation(cls) -> tuple[str, ...]:
        """The metrics that the validation split gives: fewer where it has no answers to check."""
        return cls.metrics

    @abstractmethod
    def prepare(self, loaded: Loaded, seed: int = 0, splits: Collection[SplitName] = SPLITS) -> TaskData:
        """Build the data for this model. Validation and test split never depend on ``seed``.

        Args:
            loaded: the model.
            seed: of the run.
            splits: which to build; what only the others need is not read, and theirs are ``Unread``.
        """

    def check(self, loaded: Loaded, **limits: int) -> None:
        """Refuse a model of the other modality and sizes that the data cannot give.

        Args:
            loaded: the model that the data is prepared for.
            limits: number of examples that exist, by split.

        Raises:
            ValueError: the modality differs, or a size is no whole number in [1, limit].
        """
        if loaded.modality != self.modality:
            fitting = ", ".join(task.name for task in TASKS.values() if task.modality == loaded.modality)
            raise ValueError(
                f"task {self.name!r} is for {self.modality} models, but {loaded.name!r} is a "
                f"{loaded.modality} model; tasks for it: {fitting or 'none'}"
            )
        for split, limit in limits.items():
            size = getattr(self, f"{split}_size")
            if not whole(size):
                raise ValueError(f"{split}_size {size!r} of task {self.name!r} is no whole number")
            if not 1 <= size <= limit:
                raise ValueError(f"{split}_size {size} is outside [1, {limit}] of task {self.name!r}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; afterwards every submodule has the training flag that it had before.

    ``no_grad`` rather than ``inference_mode``: a model that caches a tensor on its first forward (positions,
    masks) would keep an inference tensor, which a later training step may not use.

    Yields:
        The device of the model's parameters, where its batches belong.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield next((p.device for p in model.parameters()), torch.device("cpu"))
    finally:
        for module, training in modes:  # set one by one: ``train(mode)`` would overwrite the children
            module.training = training
