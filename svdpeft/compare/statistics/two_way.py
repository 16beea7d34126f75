"""Which differences between methods are real: intervals, paired tests on the same test items, how many seeds it takes.

    d[s, i] = μ + seed_s + item_i + e_si        the method's score minus the baseline's, seed s, test item i

Seeds and items are both random: a claim about methods is one about other seeds and other items of the same kind. With
S seeds and N items, and the mean squares of the two-way layout, the test at level α finds a difference where |d̄| > h,

    h² = [max(t²(S−1) MS_seed, t²((S−1)(N−1)) MS_res) + t²(N−1) max(0, MS_item − MS_res)] / (S N)

with t(ν) the two-sided quantile of Student's t. Every source of variance has the quantile of its own degrees of freedom
(Banerjee 1960). One quantile for all, at Satterthwaite's degrees of freedom (quasi-F and min F' in Clark 1973), finds
differences where there are none more often than it says: with 3 seeds and a correction for 8 comparisons, three times
as often. ``docs/statistics.md`` has the reasons, the proof and the sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

POWER = 0.8  # of a number of seeds that "would settle it"
NAN = float("nan")


@dataclass(frozen=True)
class Components:
    """The variances of one difference d[s, i]: between seeds, between test items, and what is left."""

    seed: float
    item: float
    residual: float


UNKNOWN = Components(NAN, NAN, NAN)


@dataclass(frozen=True)
class MeanSquares:
    """Mean and mean squares of a table of differences; numbers, or arrays for many tables at once."""

    mean: Any
    seed: Any
    item: Any
    residual: Any
    seeds: int
    items: int

    @classmethod
    def of(cls, d: np.ndarray) -> MeanSquares:
        """Return those of differences (*b, seeds, items); with one seed, its and the residual mean square are 0.

        Example:
            >>> found = MeanSquares.of(np.array([[1.0, 0.0], [3.0, 2.0]]))
            >>> float(found.mean), float(found.seed), float(found.item), float(found.residual)
            (1.5, 4.0, 1.0, 0.0)
        """
        seeds, items = d.shape[-2:]
        mean = d.mean((-2, -1), keepdims=True)
        by_seed, by_item = d.mean(-1, keepdims=True) - mean, d.mean(-2, keepdims=True) - mean
        free = max(seeds - 1, 1)
        return cls(
            mean[..., 0, 0],
            items * (by_seed**2).sum((-2, -1)) / free,
            seeds * (by_item**2).sum((-2, -1)) / (items - 1),
            ((d - mean - by_seed - by_item) ** 2).sum((-2, -1)) / (free * (items - 1)),
            seeds,
            items,
        )

    @property
    def components(self) -> Components:
        """The variances that the mean squares estimate; those that come out negative are 0."""
        if self.seeds == 1:
            return UNKNOWN  # one seed cannot tell an item's own effect from noise
        return Components(
            max(0.0, float(self.seed - self.residual) / self.items),
            max(0.0, float(self.item - self.residual) / self.seeds),
            float(self.residual),
        )

    @property
    def variance(self) -> Any:
        """The variance of the mean: h² of the module's formula without its quantiles."""
        of_seeds = np.maximum(self.seed, self.residual) if self.seeds > 1 else 0.0
        return (of_seeds + np.maximum(0, self.item - self.residual)) / float(self.seeds * self.items)

    def half_width(self, alpha: float) -> Any:
        """Return h of the module's formula: mean ± h is the interval at confidence 1 − ``alpha``."""
        of_items = quantile(alpha, self.items - 1) ** 2 * np.maximum(0, self.item - self.residual)
        of_seeds = 0.0
        if self.seeds > 1:
            # never less than what the test items alone leave open: a few seeds with 0/1 scores can tie by chance
            floor = quantile(alpha, (self.seeds - 1) * (self.items - 1)) ** 2 * self.residual
            of_seeds = np.maximum(quantile(alpha, self.seeds - 1) ** 2 * self.seed, floor)
        # a float: NumPy 1 makes objects of whole numbers beyond 64 bits
        return np.sqrt((of_seeds + of_items) / float(self.seeds * self.items))

    def within(self, alpha: float) -> float:
        """Return the least margin that two one-sided tests at level ``alpha`` find the true difference to be inside.

        |mean| + h at level 2 ``alpha``: the interval of that level reaches no further, to either side.

        Source: Schuirmann, A comparison of the two one-sided tests procedure and the power approach for assessing the
        equivalence of average bioavailability, Journal of Pharmacokinetics and Biopharmaceutics 15, 1987.
        """
        return float(abs(self.mean) + self.half_width(min(1.0, 2 * alpha)))

    def p(self) -> float:
        """Return the smallest level at which 0 is outside the interval; below 1e-100 it is 0."""
        from scipy.optimize import root_scalar

        if self.mean == 0:
            return 1.0
        smallest = math.log(1e-100)

        def short(x: float) -> float:
            return float(self.half_width(math.exp(x)) - abs(self.mean))

        return math.exp(root_scalar(short, bracket=(smallest, 0.0)).root) if short(smallest) > 0 else 0.0


def power(mean: float, components: Components, seeds: int, items: int, alpha: float) -> float:
    """Return how often the test at level ``alpha`` would find a true difference ``mean``.

    The mean squares of seeds and items are integrated over their χ²(S−1) and χ²(N−1); the residual one counts as known.

    Example:
        >>> [round(power(0.02, Components(1e-4, 0.0, 0.1), seeds, 1000, 0.05), 2) for seeds in (3, 5, 10)]
        [0.28, 0.66, 0.98]
    """
    from scipy.special import chdtri, ndtr

    def drawn(expected: float, freedom: float, count: int) -> np.ndarray:
        """``count`` equally likely values of a mean square."""
        return expected * chdtri(freedom, (np.arange(count) + 0.5) / count) / freedom

    of_seeds = items * components.seed + components.residual
    of_items = seeds * components.item + components.residual
    sd = math.sqrt((of_seeds + of_items - components.residual) / (seeds * items))
    if not sd:
        return float(mean != 0)
    seed, item = drawn(of_seeds, seeds - 1.0, 400)[:, None], drawn(of_items, items - 1.0, 20)
    h = MeanSquares(mean, seed, item, components.residual, seeds, items).half_width(alpha)
    return float((ndtr((mean - h) / sd) + ndtr((-mean - h) / sd)).mean())


def needed(squares: MeanSquares, alpha: float) -> tuple[int | None, int | None]:
    """Return the seeds, and the test items if the present ones do not suffice, that find this difference at 80 % power.

    Infinitely many seeds would leave σ²_item/N. Where that is too much, twice the items at which it would just not be
    leave as much room for the seeds as for the items.

    Returns:
        (more seeds than now, None) · (seeds, items) together · (None, None) for no difference, or for one seed.
    """
    from scipy.special import ndtri

    c = squares.components
    if squares.mean == 0 or squares.seeds == 1:
        return None, None
    at_least = (quantile(alpha, squares.items - 1) + ndtri(POWER)) ** 2 * c.item / squares.mean**2
    more_items = None if squares.items > 1.05 * at_least else math.ceil(2 * at_least)  # closer, it takes endless seeds
    items = more_items or squares.items
    first = squares.seeds + (more_items is None)
    return _smallest(lambda seeds: power(squares.mean, c, seeds, items, alpha) >= POWER, first), more_items


def quantile(alpha: float, freedom: int) -> float:
    """The two-sided quantile of Student's t."""
    from scipy.special import stdtrit  # a hundred times faster than scipy.stats.t

    return -float(stdtrit(float(freedom), alpha / 2))


def _smallest(enough: Callable[[int], bool], first: int) -> int:
    """The smallest number from ``first`` on that is enough; enough stays enough."""
    short, long = first - 1, first
    while not enough(long):
        short, long = long, 2 * long
    while long - short > 1:
        middle = (short + long) // 2
        short, long = (short, middle) if enough(middle) else (middle, long)
    return long
