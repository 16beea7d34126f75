"""Levels for looking at a comparison before all of its seeds are there."""

from __future__ import annotations

import math
from collections.abc import Sequence


def levels(seeds: Sequence[int], alpha: float = 0.05) -> list[float]:
    """Return the levels of the tests at several planned looks, which all together hold ``alpha``.

    With t the share of the seeds that are there, α(t) = 2 − 2Φ(z/√t) may be spent until then, where z is the two-sided
    normal quantile of ``alpha``: next to nothing at first, nearly all at the end. A look is tested at what was not
    spent before, α(t) − α(t of the look before). Any dependence between the looks will do, so the t-tests of few seeds
    may be taken; the exact recursion for normal statistics gives the last look a little more.

    Args:
        seeds: how many are there at each look, rising; the last is all of them.
        alpha: of all looks together, in (0, 1).

    Raises:
        ValueError: the numbers do not rise from at least 2, or ``alpha`` is outside (0, 1).

    Example:
        >>> [round(level, 4) for level in levels([3, 5, 10])]
        [0.0003, 0.0052, 0.0444]

    Source: Lan & DeMets, Discrete sequential boundaries for clinical trials, Biometrika 70, 1983; the function is that
    of O'Brien & Fleming's boundary.
    """
    from scipy.special import ndtr, ndtri

    if not 0 < alpha < 1:
        raise ValueError(f"alpha {alpha} is outside (0, 1); 5 % is 0.05")
    if not seeds or list(seeds) != sorted({*seeds}) or seeds[0] < 2:
        raise ValueError(f"looks at {list(seeds)} seeds: numbers that rise from at least 2 are wanted")
    z = -float(ndtri(alpha / 2))
    spent = [2 * float(ndtr(-z * math.sqrt(seeds[-1] / count))) for count in seeds]
    return [now - before for now, before in zip(spent, [0.0, *spent[:-1]], strict=True)]
