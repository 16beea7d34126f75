"""Generated arithmetic stories in GSM-8K's format, split into train, validation and test by construction.

A problem is a story and its numbers. A hash of the two decides the side of the split; as every number stands
in the question, the sides share neither a pair nor a question. Nothing is drawn at random: the order of the
problems and the names in them are hashes of the seed, so a set is the same everywhere.

Format: Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021, arXiv:2110.14168.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

Split = Literal["train", "validation", "test"]
Numbers = tuple[int, ...]

# fmt: off
NAMES = (
    "Natalia", "Weng", "Betty", "Julie", "James", "Mark", "Albert", "Ken", "Alexis", "Tina", "Tom", "Randy",
    "Carla", "Jasper", "Joy", "Bella", "Hiro", "Amara", "Luis", "Ingrid", "Omar", "Priya", "Sven", "Yara",
)
THINGS = (
    "apples", "beads", "books", "buttons", "cards", "coins", "cookies", "marbles", "pencils", "ribbons",
    "shells", "stamps",
)
# fmt: on

STEP = re.compile(r"\[(\w)=(\w+)([-+*/])(\w+)\]")  # [c=a*b]: computes c, and is shown as 48*2 = <<48*2=96>>96
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@dataclass(frozen=True)
class Story:
    """A template: a question with ``{a}``, ``{b}``, …, ``{name}``, ``{other}``, ``{things}``, and its steps.

    Args:
        question: holds every number of ``bounds``, so that the text determines the numbers.
        solution: a sentence per step, with ``[c=a*b]`` where a value is computed; the last one is the answer.
        bounds: least and greatest value of ``a``, ``b``, … in this order.
    """

    question: str
    solution: str
    bounds: tuple[tuple[int, int], ...]

    def values(self, numbers: Numbers) -> dict[str, int] | None:
        """Every value by its letter; None if one is not whole, or below 2 (plurals stay right)."""
        values = dict(zip("abcdefgh", numbers, strict=False))
        for target, left, sign, right in STEP.findall(self.solution):
            x, y = (values[term] if term in values else int(term) for term in (left, right))
            values[target] = OPERATORS[sign](x, y)
            if values[target] < 2 or (sign == "/" and values[target] * y != x):
                return None
        return values


STORIES = (
    Story(
        "{name} sold {a} {things} in April, and {b} times as many in May. "
        "How many {things} did {name} sell altogether in April and May?",
        "{name} sold [c=a*b] {things} in May.\n{name} sold [d=a+c] {things} altogether.",
        ((3, 99), (2, 9)),
    ),
    Story(
        "{name} has {a} {things}. {other} gives {name} {b} more, and then {name} loses {c} of them. "
        "How many {things} does {name} have now?",
        "With the gift {name} has [d=a+b] {things}.\nAfter the loss {name} has [e=d-c] {things}.",
        ((5, 40), (3, 30), (2, 9)),
    ),
    Story(
        "A box holds {a} {things}. {name} shares the {things} of {b} boxes equally among {c} children. "
        "How many {things} does each child get?",
        "{name} has [d=a*b] {things}.\nEach child gets [e=d/c] {things}.",
        ((4, 60), (2, 12), (2, 9)),
    ),
    Story(
        "{name} earns {a} dollars an hour, works {b} hours and then buys a jacket for {c} dollars. "
        "How many dollars of the pay are left?",
        "{name} earns [d=a*b] dollars.\nAfter the jacket [e=d-c] dollars are left.",
        ((8, 25), (3, 12), (15, 60)),
    ),
    Story(
        "{name} had {a} {things} and gave {b} of them to {other}. The rest went equally into {c} bags. "
        "How many {things} are in each bag?",
        "{name} had [d=a-b] {things} left.\nEach bag holds [e=d/c] {things}.",
        ((12, 99), (2, 20), (2, 9)),
    ),
    Story(
        "A baker makes {a} cakes every day from Monday to Friday, and {b} cakes on Saturday. "
        "How many cakes does the baker make in these six days?",
        "From Monday to Friday the baker makes [c=a*5] cakes.\nIn six days the baker makes [d=c+b] cakes.",
        ((3, 50), (2, 60)),
    ),
    Story(
        "{name} reads a book of {a} pages: {b} pages on the first day, and twice as many on the second. "
        "How many pages remain?",
        "On the second day {name} reads [c=b*2] pages.\n"
        "In two days {name} reads [d=b+c] pages.\nThere remain [e=a-d] pages.",
        ((60, 240), (5, 30)),
    ),
    Story(
        "{name} buys {a} {things} at {b} dollars each, and {other} buys {c} {things} at {d} dollars each. "
        "How many dollars do they spend together?",
        "{name} spends [e=a*b] dollars.\n{other} spends [f=c*d] dollars.\nTogether that is [g=e+f] dollars.",
        ((2, 12), (2, 9), (3, 12), (2, 9)),
    ),
    Story(
        "{name} has {a} {things}, {b} more than {other}. How many {things} do they have together?",
        "{other} has [c=a-b] {things}.\nTogether they have [d=a+c] {things}.",
        ((10, 80), (2, 40)),
    ),
    Story(
        "A train has {a} cars with {b} seats each. Half of them are empty. How many passengers have a seat?",
        "The train has [c=a*b] seats.\nOf the passengers [d=c/2] have a seat.",
        ((3, 20), (10, 80)),
    ),
    Story(
        "{name} saves {a} dollars a week for {b} weeks. A bicycle costs {c} dollars. "
        "How many dollars does {name} still need?",
        "{name} saves [d=a*b] dollars.\n{name} still needs [e=c-d] dollars.",
        ((4, 20), (3, 10), (90, 180)),
    ),
)


@dataclass(frozen=True)
class Problem:
    """One problem: ``question`` and ``answer`` as in GSM-8K's files, ``result`` the number after ``####``."""

    question: str
    answer: str
    result: int
    key: tuple[int, Numbers]  # index of the story, its numbers


def digest(*parts: object) -> int:
    """A 64-bit number that depends on nothing but the parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


@cache
def pool(story: Story, split: Split) -> tuple[Numbers, ...]:
    """The numbers of a story that lie on this side: a quarter is for the test, a quarter for validation."""

    def side(numbers: Numbers) -> Split:
        quarters: tuple[Split, ...] = ("test", "validation", "train", "train")
        return quarters[digest(story.question, numbers) % 4]

    every = itertools.product(*(range(low, high + 1) for low, high in story.bounds))
    return tuple(numbers for numbers in every if side(numbers) == split and story.values(numbers))


def limit(split: Split) -> int:
    """How many problems this side can give, every story equally often."""
    return len(STORIES) * min(len(pool(story, split)) for story in STORIES)


def render(index: int, numbers: Numbers, seed: int) -> Problem:
    """Tell story ``index`` with these numbers; the seed chooses the names and the things."""
    story, h = STORIES[index], digest(seed, index, numbers)
    values = story.values(numbers)
    assert values is not None, f"{numbers} has no whole solution in {story.question!r}"
    first, second = h % len(NAMES), h // len(NAMES) % (len(NAMES) - 1)
    things = THINGS[(h >> 32) % len(THINGS)]
    words = {"name": NAMES[first], "other": NAMES[first - 1 - second], "things": things}

    def show(match: re.Match[str]) -> str:
        target, left, sign, right = match.groups()
        sum_ = f"{values.get(left, left)}{sign}{values.get(right, right)}"
        return f"{sum_} = <<{sum_}={values[target]}>>{values[target]}"

    result = values[STEP.findall(story.solution)[-1][0]]
    answer = f"{STEP.sub(show, story.solution).format(**words)}\n#### {result}"
    return Problem(story.question.format(**words, **values), answer, result, (index, numbers))


def problems(split: Split, size: int, seed: int = 0) -> list[Problem]:
    """The first ``size`` problems of one side, all different, the stories in turn.

    Args:
        split: side of the split; at no seeds do the two share a question, or a story with its numbers.
        size: number of problems, 1..``limit(split)``; a larger set begins with the smaller one.
        seed: chooses the order of the numbers, and the names.

    Raises:
        ValueError: ``size`` is outside its limit.
    """
    if not 1 <= size <= limit(split):
        raise ValueError(f"{size} {split} problems are outside [1, {limit(split)}]")
    queues = [sorted(pool(story, split), key=lambda numbers: digest(seed, numbers)) for story in STORIES]
    turns = (divmod(i, len(STORIES)) for i in range(size))
    return [render(index, queues[index][turn], seed) for turn, index in turns]
