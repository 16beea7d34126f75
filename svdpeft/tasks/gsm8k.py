"""GSM-8K, grade-school word problems, as PiSSA and SORSA test on it: exact match of the final number.

Source: Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021, arXiv:2110.14168.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from svdpeft.registry import TASKS
from svdpeft.tasks.answers import final_number
from svdpeft.tasks.language import Example
from svdpeft.tasks.reasoning import Reasoning


@TASKS.register("gsm8k")
@dataclass(frozen=True)
class GSM8K(Reasoning):
    """Word problems of two to eight steps; accuracy in [0, 1], over 1,319 problems.

    Its own training set has 7,473 problems. The papers' setting is ``train_on="metamathqa"`` with a ``train_size`` of
    100,000; 512 tokens an example and up to 1,024 new ones are theirs, too.

    Args:
        train_size: number of training examples.
        validation_size: number of examples held out from the end of the training data.
        test_size: number of test problems, the first ones.
    """

    train_size: int = 7000
    validation_size: int = 256
    test_size: int = 1319
    max_new_tokens: int | None = 1024
    train_on: str = "gsm8k"

    fields = ("question", "answer")
    origin = "GSM"
    hub = ("openai/gsm8k", ("main",))

    def gold(self, solution: str) -> float | None:
        """The number at the end of a solution."""
        return final_number(solution)

    def judge(self, texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """1 where the final number is the reference's, else 0."""
        return [float(final_number(text) == example.gold) for text, example in zip(texts, examples, strict=True)]
