"""What ``gsm8k`` and ``math`` share: training on MetaMathQA, as PiSSA and SORSA do, or on the test's own sister set.

Source: MetaMathQA is of Yu et al., "MetaMath: Bootstrap Your Own Mathematical Questions for Large Language Models",
ICLR 2024, arXiv:2309.12284.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from svdpeft.models import Loaded
from svdpeft.registry import near_miss
from svdpeft.tasks.base import SPLITS, SplitName
from svdpeft.tasks.corpora import Row, hold_out, need, rows
from svdpeft.tasks.language import INSTRUCTION, STEP_BY_STEP, Example, LanguageTask

METAMATHQA = "metamathqa"


@dataclass(frozen=True)
class Reasoning(LanguageTask):
    """A test of mathematical reasoning.

    Validation comes from the end of the training data, and what asks one of its questions in other words, or a test
    question, is not trained on. No split depends on the seed of a run.

    Args:
        train_on: the task's own name, its training set in the prompt of the evaluation; or ``"metamathqa"``, in the
            format of the papers: the response right after ``### Response:``.
        path: a local copy of the task's data, a folder; ``None``: from the hub.
        train_data: a local copy of what is trained on, a folder or a file; ``None``: that in ``path`` for the own
            training set, else from the hub.
    """

    max_length: int | None = 512
    train_on: str = METAMATHQA
    path: str | None = None
    train_data: str | None = None

    fields: ClassVar[tuple[str, str]]  # question and solution, in the task's own files
    origin: ClassVar[str]  # how the types of MetaMathQA begin that come from this task's training set
    hub: ClassVar[tuple[str, tuple[str, ...]]]  # name and configurations on the hub

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_on not in (known := (METAMATHQA, self.name)):
            raise ValueError(
                f"task {self.name!r} cannot train on {self.train_on!r}: {near_miss(str(self.train_on), known)}"
            )

    @abstractmethod
    def gold(self, solution: str) -> float | str | None:
        """The answer that a reference solution ends with, None if it has none."""

    def order(self, found: Sequence[Row]) -> Sequence[Row]:
        """The task's own rows in the order in which splits are taken from them: that of the files."""
        return found

    def read(self, loaded: Loaded, splits: Collection[SplitName] = SPLITS) -> dict[str, list[Example]]:
        """Read the test data, for the other splits the training data too, and put what is asked into the prompts."""
        papers = self.train_on == METAMATHQA
        question, solution = self.fields
        hub, configs = self.hub
        test = rows(self.path, "test", hub, configs, option="path")
        need(test, self.fields, f"the test split of {self.name}")
        test = self.order(test)

        def example(asked: str, answer: str) -> Example:
            gold = self.gold(answer)
            prompt = STEP_BY_STEP.format(question=asked)
            if papers:
                return Example(INSTRUCTION.format(question=asked), answer, prompt, gold)
            return Example(prompt, f" {answer}", prompt, gold)

        parts: dict[str, list[Example]] = {}
        if "test" in splits:
            self.check(loaded, test=len(test))
            parts["test"] = [example(row[question], row[solution]) for row in test[: self.test_size]]
            for i, each in enumerate(parts["test"], 1):
                if each.gold is None:
                    raise ValueError(
                        f"problem {i} of the test split of {self.name} has no answer: {each.answer[-80:]!r}"
                    )
        if set(splits) <= {"test"}:
            return parts
        if papers:
            found = rows(self.train_data, "train", "meta-math/MetaMathQA", option="train_data")
            ask, reply = "query", "response"
        else:
            found = rows(self.train_data or self.path, "train", hub, configs, option="path")
            ask, reply = question, solution
        need(found, (ask, reply), f"the training data {self.train_on}")
        found = found if papers else self.order(found)

        def keys(row: Row) -> Iterable[str]:
            return row[ask], row.get("original_question") or row[ask]

        def eligible(row: Row) -> bool:  # like the test: MetaMathQA mixes both
            ours = not papers or str(row.get("type") or self.origin).startswith(self.origin)
            return ours and self.gold(row[reply]) is not None

        train, validation = hold_out(found, self.validation_size, keys, eligible, (row[question] for row in test))
        if "train" in splits:
            self.check(loaded, train=len(train))
            parts["train"] = [example(row[ask], row[reply]) for row in train[: self.train_size]]
        if "validation" in splits:
            parts["validation"] = [example(row[ask], row[reply]) for row in validation]
        return parts
