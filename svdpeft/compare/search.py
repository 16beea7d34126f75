"""The learning rate of every method, tried on the validation split before the runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from svdpeft.compare.run import Job
from svdpeft.compare.spec import Entry, Spec
from svdpeft.tasks.base import higher_is_better

_WORST = (-math.inf, -math.inf)
Line = tuple[str, Any]  # label and budget


def search(
    spec: Spec, grid: Sequence[tuple[Entry, Any]], train: Callable[[Sequence[Job]], Sequence[dict[str, Any]]]
) -> dict[Line, dict[str, Any]]:
    """Try learning rates on the validation split, rung by rung, and return what was found for each line of the grid.

    Args:
        spec: with a search.
        grid: the lines of the comparison.
        train: does the jobs, and returns their records.

    Returns:
        By label and budget: the chosen ``lr``, the ``tried`` ones with their values at the last rung that they
        reached, and whether the chosen one lies at the ``edge`` of its grid, so that a better one may lie outside.
    """
    found = spec.search
    assert found is not None
    alive = {(entry.label, limit): found.rates(entry.lr) for entry, limit in grid}
    values: dict[Line, dict[float, dict[str, Any]]] = {key: {} for key in alive}

    def best(key: Line) -> float:
        return max(alive[key], key=lambda lr: _worth(values[key][lr]))

    def attempt(rates: Mapping[Line, Sequence[float]], rung: int, share: float) -> None:
        """Train every rate with every seed of the search."""
        jobs = [
            Job(spec, replace(entry, lr=lr), limit, seed, rung, share)
            for entry, limit in grid
            for lr in rates.get((entry.label, limit), ())
            for seed in found.trained
        ]
        groups: dict[tuple[Line, float], list[dict[str, Any]]] = {}
        for job, record in zip(jobs, train(jobs), strict=True):
            groups.setdefault(((job.entry.label, job.budget), job.entry.lr), []).append(record)
        for (key, lr), trials in groups.items():
            values[key][lr] = _mean(trials)

    rung = 0
    for rung, (count, share) in enumerate(found.rungs()):
        for key, rates in alive.items():
            ranked = sorted(rates, key=lambda lr, key=key: _worth(values[key].get(lr)), reverse=True)
            alive[key] = sorted(ranked[:count]) if rung else rates
        attempt(alive, rung, share)
    for _ in range(found.further):
        following = {}
        for key in alive:
            rate = found.beyond(best(key), [*values[key]])
            if rate is not None and _worth(values[key][best(key)]) != _WORST:
                following[key] = [rate]
                alive[key] = [*alive[key], rate]
        if not following:
            break
        attempt(following, rung, 1.0)
    result = {}
    for entry, limit in grid:
        key = entry.label, limit
        chosen = best(key)
        if _worth(values[key][chosen]) == _WORST:
            chosen = entry.lr  # no trial has a value: the run itself will say why
        rates = sorted(values[key])
        tried = [[lr, values[key][lr].get("value")] for lr in rates]
        result[key] = {"lr": chosen, "tried": tried, "edge": chosen in (rates[0], rates[-1])}
    return result


def _mean(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the trials of one rate came to together; one that has no value leaves the rate without one."""
    if lost := [trial for trial in trials if _worth(trial) == _WORST]:
        return lost[0]
    means = {n: statistics.fmean(t[n] for t in trials) for n in ("value", "loss") if n in trials[0]}
    return trials[0] | means


def _worth(record: dict[str, Any] | None) -> tuple[float, float]:
    """Sort key of a trial: by its metric, then by its loss; one that failed or diverged is the worst."""
    if record is None or record.get("value") is None or record.get("loss", 0.0) is None:
        return _WORST
    value = record["value"] if higher_is_better(record["metric"]) else -record["value"]
    return value, -record.get("loss", math.inf)
