"""How many seeds a question takes, from how much the committed comparisons vary.

    python -m benchmarks.power

Every comparison in ``results`` is a pilot: each of its methods against LoRA, paired, gives variances of one difference
between seeds, between test items and of the rest (``docs/statistics.md``). Those of three seeds are poor estimates,
each wrong by a factor of two to six; what is taken is the median over methods, and beside it the ends of their middle
half.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from svdpeft.compare.report import read
from svdpeft.compare.statistics import Components, MeanSquares, needed, power
from svdpeft.compare.statistics.paired import paired
from svdpeft.compare.statistics.two_way import POWER
from svdpeft.compare.store import Store

RESULTS = Path(__file__).parent / "results"
SEEDS = 10  # of a comparison that is planned
LEVEL = 0.05
CNN, VIT, WORDS, DEMO = "zoo/efficientnet-lite0", "zoo/dinov2-vits14", "wordproblems", "demo"
PARTS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Pilot:
    """A committed comparison, and what of it is looked at.

    Args:
        folder: in ``results``.
        metric: of the test items; or a number of a run: "forgetting", or "loss at 30 %" of the steps in training.
        baseline: what the methods are compared with.
        only: the one method that is.
    """

    folder: str
    metric: str
    baseline: str = "LoRA"
    only: str = ""

    @property
    def name(self) -> str:
        return f"{self.folder}, {self.metric}" + (f", {self.only}" if self.only else "")

    @property
    def unit(self) -> str:
        if self.metric == "accuracy":
            return "points"
        return "1 − cos" if self.metric == "forgetting" and self.folder != WORDS else "nats"


@dataclass(frozen=True)
class Question:
    """One that is asked of a comparison.

    Args:
        text: what is compared with what.
        pilot: whose variances are taken.
        smallest: difference that matters, in the metric's own unit.
        comparisons: the size of its family.
        items: test items of the comparison that is planned.
    """

    text: str
    pilot: Pilot
    smallest: float
    comparisons: int
    items: int


GAMMA = Pilot(WORDS, "loss", "SORSA without regulariser", "SORSA")
QUESTIONS = (
    Question("1. SORSA with three γ against none", GAMMA, 0.02, 3, 64),
    Question("2. SORSA, PiSSA, LoRA, all pairs", Pilot(CNN, "accuracy"), 0.02, 3, 1000),
    Question("2.", Pilot(DEMO, "accuracy"), 0.02, 3, 1000),
    Question("2.", Pilot(VIT, "accuracy"), 0.02, 3, 1000),
    Question("2.", Pilot(WORDS, "loss"), 0.02, 3, 64),
    Question("3. Four patterns of SVFT against LoRA", Pilot(CNN, "accuracy"), 0.02, 4, 1000),
    Question("3.", Pilot(WORDS, "loss"), 0.02, 4, 64),
    Question("4. Three minor starts against PiSSA: forgetting", Pilot(CNN, "forgetting", "PiSSA"), 0.05, 3, 0),
    Question("4.", Pilot(WORDS, "forgetting", "PiSSA"), 0.05, 3, 0),
    Question("5. Two principal starts, three losses, against LoRA", Pilot(CNN, "loss at 10 %"), 0.05, 6, 0),
    Question("5.", Pilot(CNN, "loss at 30 %"), 0.05, 6, 0),
    Question("5.", Pilot(CNN, "loss at 100 %"), 0.05, 6, 0),
    Question("6. DoRA, OFT, LoRA-XS, AdaLoRA against LoRA", Pilot(CNN, "accuracy"), 0.02, 4, 1000),
)


@cache
def variances(pilot: Pilot) -> list[Components]:
    """The variances of every method's difference from the baseline; of a number of a run those between seeds alone."""
    items = pilot.metric in ("accuracy", "loss")
    results = read(Store(RESULTS / pilot.folder), pilot.metric if items else None)
    take = None if items else number(pilot.metric)
    scores = {
        row.label: {
            run["identity"]["seed"]: run["items"][pilot.metric] if take is None else [take(run)] * 2 for run in row.runs
        }
        for row in results.rows
        if pilot.only in ("", row.label) or row.label == pilot.baseline
    }
    tables = [paired(scores, label, pilot.baseline)[0] for label in scores if label != pilot.baseline]
    return [MeanSquares.of(table).components for table in tables if table is not None]


def number(metric: str) -> Callable[[dict], float]:
    """What is taken of a run: what it forgot, or its loss in training, around a share of the steps.

    Example:
        >>> number("loss at 10 %")({"loss": [[step, float(step)] for step in range(1, 101)]})
        5.5
        >>> number("forgetting")({"forgetting": {"before": 1.0, "after": 1.5}})
        0.5
    """
    if metric == "forgetting":
        return lambda run: run["forgetting"]["after"] - run["forgetting"]["before"]
    share = float(metric.removeprefix("loss at ").removesuffix(" %")) / 100

    def loss(run: dict) -> float:
        losses = [value for _, value in run["loss"]]
        last = max(1, round(share * len(losses)))
        width = max(1, len(losses) // 10)  # the mean of a tenth of the steps, which end there
        return statistics.fmean(losses[max(0, last - width) : last])

    return loss


def typical(found: Sequence[Components], part: float) -> Components:
    """A part of the way through the variances of all methods, each of the three by itself."""
    names = ("seed", "item", "residual")
    return Components(*(float(np.quantile([getattr(each, name) for each in found], part)) for name in names))


def seeds_for(difference: float, components: Components, items: int, alpha: float) -> tuple[int, int | None]:
    """Seeds that find the difference with 80 % power, and test items where the planned ones are too few."""
    c, n = components, max(items, 2)
    squares = MeanSquares(difference, n * c.seed + c.residual, 2 * c.item + c.residual, c.residual, 2, n)
    seeds, more = needed(squares, alpha)
    assert seeds is not None
    return seeds, more


def detectable(components: Components, seeds: int, items: int, alpha: float) -> float:
    """The difference that so many seeds find with 80 % power."""
    low, high = 0.0, 1e-6
    while power(high, components, seeds, max(items, 2), alpha) < POWER:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        short = power(middle, components, seeds, max(items, 2), alpha) < POWER
        low, high = (middle, high) if short else (low, middle)
    return high


def _told(values: Sequence[float], unit: str) -> str:
    """The middle one, and the two ends where they are others."""
    low, middle, high = (f"{100 * value:.2g}" if unit == "points" else f"{value:.2g}" for value in values)
    return middle if low == high else f"{middle} ({low} to {high})"


def pilots() -> Iterator[str]:
    """The deviations of the pilots: median over methods, and their middle half."""
    yield "| pilot | unit | differences | between seeds | between items | rest |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    for pilot in dict.fromkeys(question.pilot for question in QUESTIONS):
        found = variances(pilot)
        ends = [typical(found, part) for part in PARTS]
        cells = []
        for name in ("seed", "item", "residual"):
            values = [math.sqrt(getattr(each, name)) for each in ends]
            cells.append(_told(values, pilot.unit) if pilot.metric in ("accuracy", "loss") or name == "seed" else "–")
        yield f"| {pilot.name} | {pilot.unit} | {len(found)} | {' | '.join(cells)} |"


def plan() -> Iterator[str]:
    """What every question takes."""
    yield f"| question | pilot | smallest that matters | seeds for 80 % | what {SEEDS} seeds show |"
    yield "| --- | --- | ---: | ---: | ---: |"
    for question in QUESTIONS:
        found, alpha, unit = variances(question.pilot), LEVEL / question.comparisons, question.pilot.unit
        counts, shown = [], []
        for part in PARTS:
            components = typical(found, part)
            seeds, more = seeds_for(question.smallest, components, question.items, alpha)
            counts.append(f"{seeds:,}" + (f", {more:,} items" if more else ""))
            shown.append(detectable(components, SEEDS, question.items, alpha))
        several = f" ({counts[0]} to {counts[2]})" if counts[0] != counts[2] else ""
        yield (
            f"| {question.text} | {question.pilot.name} | {_told([question.smallest] * 3, unit)} {unit} "
            f"| {counts[1]}{several} | {_told(shown, unit)} |"
        )


if __name__ == "__main__":
    print("\n".join([*pilots(), "", *plan()]))
