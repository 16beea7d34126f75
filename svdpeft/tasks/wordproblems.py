"""Arithmetic word problems for language models: GSM-8K's format and prompt on stories that need no download.

The loss is taken on the response alone; the metric is the exact match of the final number, decoded greedily.

Source: the answers follow GSM-8K (Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021,
arXiv:2110.14168).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from svdpeft.models import Loaded
from svdpeft.registry import TASKS
from svdpeft.tasks.answers import final_number
from svdpeft.tasks.base import SPLITS, SplitName
from svdpeft.tasks.language import STEP_BY_STEP, Example, LanguageTask
from svdpeft.tasks.stories import Problem, limit, problems


@TASKS.register("wordproblems")
@dataclass(frozen=True)
class WordProblems(LanguageTask):
    """Stories of two or three steps with the four operations; accuracy in [0, 1].

    The splits share neither a question nor a story with its numbers (see ``stories``). They are fixed: the seed of a
    run changes initialisation and batch order only.

    Args:
        train_size: number of training problems.
        validation_size: number of validation problems.
        test_size: number of test problems.
        data_seed: chooses another set of training problems; the others stay.
    """

    train_size: int = 256
    validation_size: int = 64
    test_size: int = 64
    data_seed: int = 0

    def read(self, loaded: Loaded, splits: Collection[SplitName] = SPLITS) -> dict[str, list[Example]]:
        """Tell the stories, the reference after a space behind the prompt."""
        self.check(loaded, **{split: limit(split) for split in splits})
        told = {
            split: problems(split, getattr(self, f"{split}_size"), self.data_seed if split == "train" else 0)
            for split in splits
        }
        return {split: [_example(problem) for problem in found] for split, found in told.items()}

    def judge(self, texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """1 where the final number is the reference's, else 0."""
        return [float(final_number(text) == example.gold) for text, example in zip(texts, examples, strict=True)]


def _example(problem: Problem) -> Example:
    prompt = STEP_BY_STEP.format(question=problem.question)
    return Example(prompt, f" {problem.answer}", prompt, problem.result)
