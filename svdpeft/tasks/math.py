"""MATH, competition mathematics, as PiSSA and SORSA test on it; answers are judged by math-verify.

Source: Hendrycks et al., "Measuring Mathematical Problem Solving With the MATH Dataset", NeurIPS 2021,
arXiv:2103.03874; math-verify is Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from svdpeft.models import Loaded
from svdpeft.registry import TASKS
from svdpeft.tasks import verdicts
from svdpeft.tasks.answers import boxed, final_answer
from svdpeft.tasks.base import SPLITS, SplitName
from svdpeft.tasks.corpora import Row
from svdpeft.tasks.language import Example
from svdpeft.tasks.reasoning import Reasoning
from svdpeft.tasks.stories import digest


@TASKS.register("math")
@dataclass(frozen=True)
class MATH(Reasoning):
    """Problems of seven subjects and five levels; accuracy in [0, 1], over 5,000 problems.

    Its own training set has 7,500 problems. The papers' setting is ``train_on="metamathqa"`` with a ``train_size`` of
    100,000; 512 tokens an example and up to 2,048 new ones are theirs, too. The answer of a
    reference is what its last ``\\boxed`` holds.

    The files go subject by subject. So MATH's own rows are taken in an order that a hash of the problem gives, the same
    everywhere: every part has all subjects.

    Args:
        train_size: number of training examples.
        validation_size: number of examples held out from the end of the training data.
        test_size: number of test problems, the first ones of that order.
    """

    train_size: int = 7000
    validation_size: int = 256
    test_size: int = 5000
    max_new_tokens: int | None = 2048
    train_on: str = "math"

    fields = ("problem", "solution")
    origin = "MATH"
    hub = (
        "EleutherAI/hendrycks_math",
        (
            "algebra",
            "counting_and_probability",
            "geometry",
            "intermediate_algebra",
            "number_theory",
            "prealgebra",
            "precalculus",
        ),
    )

    def read(self, loaded: Loaded, splits: Collection[SplitName] = SPLITS) -> dict[str, list[Example]]:
        """As ever, but say before the training if nobody will be there to judge.

        Raises:
            ImportError: math-verify is not installed.
        """
        verdicts.check()
        return super().read(loaded, splits)

    def order(self, found: Sequence[Row]) -> list[Row]:
        """Rows by the hash of their problem."""
        return sorted(found, key=lambda row: digest(row["problem"]))

    def gold(self, solution: str) -> str | None:
        """What the last ``\\boxed`` of a solution holds, else what follows ``The answer is:``."""
        return boxed(solution) or final_answer(solution)

    def judge(self, texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """1 where math-verify finds the final answer equal to the reference's, else 0."""
        found = [final_answer(text) for text in texts]
        said = [i for i, answer in enumerate(found) if answer is not None]
        equal = verdicts.equal([(str(examples[i].gold), str(found[i])) for i in said])
        right = {i for i, same in zip(said, equal, strict=True) if same}
        return [float(i in right) for i in range(len(texts))]
