"""Interleaved rounds: on a shared machine a ratio within one round means something, a second does not.

Every round runs every candidate once, in another order each time. A candidate's figure is the median over the rounds of
its ratio to the reference in the same round, with the quartiles.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

Candidate = tuple[Callable[[], Any], Callable[[Any], Any]]  # what makes ready, untimed, and what is timed with that


def seconds(candidate: Candidate) -> float:
    """Time a candidate once, to the end of what it has asked of a GPU."""
    prepare, run = candidate
    given = prepare()
    gc.collect()
    _finish()
    started = time.perf_counter()
    kept = run(given)  # so that nothing is freed within the time
    _finish()
    taken = time.perf_counter() - started
    del kept, given
    return taken


def interleaved(candidates: Mapping[str, Candidate], rounds: int, name: str) -> dict[str, list[float]]:
    """Return the seconds of each candidate, round by round, after one round that is not counted."""
    order, found = list(candidates), {name: [] for name in candidates}
    draws = random.Random(0)
    for count in tqdm(range(rounds + 1), desc=name, unit="round", leave=False):
        draws.shuffle(order)
        for each in order:
            taken = seconds(candidates[each])
            if count:
                found[each].append(taken)
    return found


def ratios(found: Mapping[str, Sequence[float]], to: str) -> dict[str, tuple[float, float, float]]:
    """Return for each candidate the median and the quartiles of its ratio to another one."""
    return {each: spread([a / b for a, b in zip(times, found[to], strict=True)]) for each, times in found.items()}


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile.

    Example:
        >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
        (3.0, 2.0, 4.0)
    """
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
