"""Intervals over seeds, and every method against the baseline with Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from svdpeft.compare.statistics.two_way import NAN, UNKNOWN, Components, MeanSquares, needed, quantile
from svdpeft.registry import near_miss


@dataclass(frozen=True)
class Interval:
    """Mean, sample standard deviation and confidence interval of ``n`` values; NaN where they do not exist."""

    mean: float
    std: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return mean ± t(n−1) · std / √n, the interval of one method's metric over its seeds.

    Args:
        values: one per seed.
        confidence: in (0, 1).

    Raises:
        ValueError: there is no value, or ``confidence`` is outside (0, 1).

    Example:
        >>> found = interval([0.93, 0.94, 0.98])
        >>> f"{found.mean:.3f} ± {found.std:.3f}, {found.low:.3f} to {found.high:.3f}"
        '0.950 ± 0.026, 0.884 to 1.016'
        >>> interval([0.93]).low
        nan

    Source: Student, The probable error of a mean, Biometrika 6, 1908.
    """
    _check(confidence)
    n = len(values)
    if not n:
        raise ValueError("no value to make an interval of")
    if not np.isfinite(values).all():  # of a run that diverged
        return Interval(NAN, NAN, NAN, NAN, n)
    mean = float(np.mean(values))
    if n < 2:
        return Interval(mean, NAN, NAN, NAN, n)
    std = float(np.std(values, ddof=1))
    half = quantile(1 - confidence, n - 1) * std / math.sqrt(n)
    return Interval(mean, std, mean - half, mean + half, n)


@dataclass(frozen=True)
class Difference:
    """A method against the baseline, on the same test items with the same seeds.

    Args:
        label: of the method.
        baseline: its label.
        mean: label − baseline, in the metric's own unit.
        low, high: the interval at the level at which Holm tested this difference: 0 is outside it exactly where the
            corrected test finds a difference. It is never narrower than the plain interval, and so covers this
            difference at least as often as ``confidence`` says; all of a family at once may be covered less often.
        p, p_corrected: two-sided; plain, and after Holm over ``comparisons``.
        within: the least margin of which, had it been named before the runs, two one-sided tests after Holm find the
            difference to be smaller, in either direction; NaN with one seed.
        comparisons: the size of the family.
        confidence: of the interval, and 1 − the level of the family.
        seeds, items: how many were used.
        components: variances of one difference.
        seeds_needed: seeds that would settle a difference of this size, where it is not real and that can be said.
        items_needed: with that many test items, where no number of seeds would do with the present ones.
        note: what was left out, or why there is no result (all numbers are then NaN).
    """

    label: str
    baseline: str
    mean: float = NAN
    low: float = NAN
    high: float = NAN
    p: float = NAN
    p_corrected: float = NAN
    comparisons: int = 0
    confidence: float = 0.95
    seeds: int = 0
    items: int = 0
    components: Components = UNKNOWN
    seeds_needed: int | None = None
    items_needed: int | None = None
    within: float = NAN
    note: str = ""

    @property
    def found(self) -> bool:
        """Whether the corrected test finds a difference; with one seed that is one between two trained models."""
        return self.p_corrected <= 1 - self.confidence

    @property
    def real(self) -> bool:
        """Whether the methods differ, beyond the seeds and test items of this comparison."""
        return self.found and self.seeds > 1

    @property
    def same(self) -> bool:
        """Whether the runs agree on every item, so that there is nothing to make an interval of."""
        return self.mean == self.low == self.high == 0


Scores = Mapping[str, Mapping[int, Sequence[float]]]


def differences(scores: Scores, baseline: str, *, confidence: float = 0.95) -> list[Difference]:
    """Compare every method with the baseline; all of them are one family for Holm's correction.

    Args:
        scores: ``scores[label][seed]``: one score per test item, in the same order everywhere.
        baseline: one of the labels.
        confidence: in (0, 1).

    Returns:
        One difference per other label, in their order. Seeds that only one of the two has are left out, and that is
        said in ``note``; without a common seed, or with scores that are not finite, the numbers are NaN.

    Raises:
        ValueError: no such baseline, item counts differ or are below 2, or ``confidence`` is outside (0, 1).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> hard = rng.normal(size=400)
        >>> def run(skill):
        ...     return (hard + rng.normal(size=400) < skill).astype(float)
        >>> scores = {name: {seed: run(skill) for seed in range(5)} for name, skill in {"A": 0.0, "B": 0.7}.items()}
        >>> (b,) = differences(scores, "A")
        >>> f"{b.mean:.3f}, {b.low:.3f} to {b.high:.3f}", b.p < 0.001, b.real
        ('0.180, 0.142 to 0.218', True, True)

    Source: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979.
    """
    _check(confidence)
    if baseline not in scores:
        raise ValueError(f"no runs of the baseline {baseline!r}: {near_miss(baseline, scores)}")
    alpha = 1 - confidence
    pairs = {label: paired(scores, label, baseline) for label in scores if label != baseline}
    tested = {label: MeanSquares.of(d) for label, (d, _) in pairs.items() if d is not None}
    p = {label: squares.p() for label, squares in tested.items()}
    # Holm tests the smallest p at α/m, the next at α/(m − 1), and stops at the first that fails: the rest fail with it
    order = sorted(p, key=p.__getitem__)
    steps = [min(1.0, (len(p) - rank) * p[label]) for rank, label in enumerate(order)]
    corrected = dict(zip(order, accumulate(steps, max), strict=True))
    passed = sum(each <= alpha for each in corrected.values())
    level = {label: alpha / (len(p) - min(rank, passed)) for rank, label in enumerate(order)}
    within = _within(tested, alpha)
    found = []
    for label, (_, note) in pairs.items():
        each = Difference(label, baseline, confidence=confidence, note=note)
        if squares := tested.get(label):
            half = float(squares.half_width(level[label]))
            each = replace(
                each,
                mean=float(squares.mean),
                low=float(squares.mean) - half,
                high=float(squares.mean) + half,
                p=p[label],
                p_corrected=corrected[label],
                comparisons=len(p),
                seeds=squares.seeds,
                items=squares.items,
                components=squares.components,
                within=within.get(label, NAN),
            )
            if not each.found:
                seeds, items = needed(squares, level[label])
                each = replace(each, seeds_needed=seeds, items_needed=items)
        found.append(each)
    return found


def _within(tested: Mapping[str, MeanSquares], alpha: float) -> dict[str, float]:
    """The margins of all: Holm takes a difference at α/m where the margin allows it, then the next at α/(m − 1)."""
    left = {label: squares for label, squares in tested.items() if squares.seeds > 1}
    found, margin = {}, 0.0
    while left:
        reached = {label: squares.within(alpha / len(left)) for label, squares in left.items()}
        label = min(reached, key=reached.__getitem__)
        found[label] = margin = max(margin, reached[label])
        del left[label]
    return found


def paired(scores: Scores, label: str, baseline: str) -> tuple[np.ndarray | None, str]:
    """The differences (seeds, items) over the common seeds, or none of them; and what is to be said of it."""
    ours, theirs = scores[label], scores[baseline]
    common = [seed for seed in ours if seed in theirs]
    if not common:
        return None, "they have no seed in common"
    rows = {(name, seed): np.asarray(scores[name][seed], float) for name in (label, baseline) for seed in common}
    count = len(rows[baseline, common[0]])
    for (name, seed), row in rows.items():
        if len(row) != count:
            raise ValueError(
                f"{name} has {len(row)} test items with seed {seed}, but {baseline} has {count} with seed {common[0]}: "
                "a paired test takes the same items"
            )
    if count < 2:
        raise ValueError(f"a paired test takes at least 2 test items, and {label} and {baseline} have {count}")
    for (name, seed), row in rows.items():
        if not np.isfinite(row).all():
            return None, f"not all scores of {name} with seed {seed} are finite"
    alone = [f"seed {seed} (only {label} has it)" for seed in ours if seed not in theirs]
    alone += [f"seed {seed} (only {baseline} has it)" for seed in theirs if seed not in ours]
    left = f"left out: {', '.join(alone)}" if alone else ""
    return np.stack([rows[label, seed] - rows[baseline, seed] for seed in common]), left


def _check(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is outside (0, 1); 95 % is 0.95")
