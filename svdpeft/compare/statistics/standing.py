"""Where each method stands among all: its rank with an interval, and how much of its lead would last.

No method is the baseline here, and none was named before the runs: what is said of the best holds for it although it
was looked for. ``docs/statistics.md`` has the simulations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from svdpeft.compare.statistics.paired import Scores, paired
from svdpeft.compare.statistics.two_way import MeanSquares, quantile

FEWEST = 4  # methods from which their spread can be told


@dataclass(frozen=True)
class Standing:
    """One method among all of a comparison.

    Args:
        label: of the method.
        best, worst: the ranks that are left to it, 1 is the best; all of the methods' at once with ``confidence``.
        lead: over the mean of all methods, in the metric's own unit: negative is below it.
        expected: how much of it a new comparison would show: the lead, drawn towards 0; NaN with fewer than four
            methods.
        low, high: interval of the true lead, around ``expected``.
    """

    label: str
    best: int
    worst: int
    lead: float
    expected: float
    low: float
    high: float


def standings(scores: Scores, higher: bool = True, confidence: float = 0.95) -> list[Standing]:
    """Rank the methods, as far as they can be told apart, and draw their leads towards the mean of all.

    A rank is left to a method unless the pairwise tests exclude it: it is behind as many as are better than it, and
    before as many as are worse, at the level of Bonferroni over all pairs. Where every pairwise interval holds its
    difference, each rank is among those that are left.

    The true leads are taken for draws from N(0, τ²). With z the lead, v the variance of its error and M methods,

        τ² = max(0, Σz²/(M−1) − mean(v))        b = (M−3)/(M−1) · v/(v+τ²)
        expected = (1−b) z        h = t(S−1) · √(v (1 − b (M−1)/M) + 2 b² z²/(M−3))

    Args:
        scores: ``scores[label][seed]``: one score per test item, in the same order everywhere. Seeds that not all
            methods have are left out.
        higher: whether more of the metric is better.
        confidence: in (0, 1).

    Returns:
        One per method, in the order of the labels, without those that have a score that is not finite; none where the
        methods have fewer than two seeds in common.

    Raises:
        ValueError: item counts differ or are below 2.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> skills = {"A": 0.0, "B": 0.1, "C": 0.1, "D": 2.0}
        >>> scores = {name: {s: skill + rng.normal(size=200) for s in range(5)} for name, skill in skills.items()}
        >>> [(each.label, each.best, each.worst) for each in standings(scores)]
        [('A', 2, 4), ('B', 2, 4), ('C', 2, 4), ('D', 1, 1)]

    Source: Al Mohamad, Goeman & van Zwet, Simultaneous confidence intervals for ranks with application to ranking
    institutions, Biometrics 78, 2022; Klein, Wright & Wieczorek, A joint confidence region for an
    overall ranking of populations, Journal of the Royal Statistical Society C 69, 2020; Morris, Parametric empirical
    Bayes inference: theory and applications, Journal of the American Statistical Association 78, 1983.
    """
    labels = [label for label in scores if all(np.isfinite(row).all() for row in scores[label].values())]
    common = [seed for seed in scores[labels[0]] if all(seed in scores[label] for label in labels)] if labels else []
    if len(labels) < 2 or len(common) < 2:
        return []
    shared = {label: {seed: scores[label][seed] for seed in common} for label in labels}
    for label in labels[1:]:
        paired(shared, label, labels[0])  # refuses other test items
    y = np.array([[shared[label][seed] for seed in common] for label in labels], float)  # (M, S, N)
    alpha = (1 - confidence) / math.comb(len(labels), 2)
    worse = np.zeros((len(labels), len(labels)), bool)  # row than column
    for i in range(1, len(labels)):
        squares = MeanSquares.of(y[i] - y[:i])
        found = np.abs(squares.mean) > squares.half_width(alpha)
        worse[i, :i] = found & ((squares.mean < 0) == higher)
        worse[:i, i] = found & ~worse[i, :i]
    best, worst = 1 + worse.sum(1), len(labels) - worse.sum(0)
    squares = MeanSquares.of(y - y.mean(0))
    lead, (expected, half) = squares.mean, _drawn_in(squares, confidence)
    low, high = expected - half, expected + half
    return [
        Standing(label, int(best[i]), int(worst[i]), *map(float, (lead[i], expected[i], low[i], high[i])))
        for i, label in enumerate(labels)
    ]


def _drawn_in(squares: MeanSquares, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """The expected leads, and half of their intervals; NaN where the methods are too few."""
    z, v = squares.mean, squares.variance
    count = len(z)
    if count < FEWEST:
        return np.full(count, math.nan), np.full(count, math.nan)
    spread = max(0.0, float((z**2).sum() / (count - 1) - v.mean()))
    b = (count - 3) / (count - 1) * np.divide(v, v + spread, out=np.zeros_like(v), where=v + spread > 0)
    left = v * (1 - b * (count - 1) / count) + 2 * b**2 * z**2 / (count - 3)
    return (1 - b) * z, quantile(1 - confidence, squares.seeds - 1) * np.sqrt(left)
