"""What a store holds, put together: a row per method and budget, the differences from the baseline, the searches."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from svdpeft.compare.records import check, check_comparison, finished, newest, without_factors
from svdpeft.compare.report.search import Search, tried
from svdpeft.compare.statistics import Difference, Interval, Standing, differences, interval, standings
from svdpeft.compare.store import Damaged, Record, Store
from svdpeft.registry import near_miss
from svdpeft.tasks.base import higher_is_better


@dataclass(frozen=True)
class Row:
    """All seeds of one method at one budget; times are medians, memory, bytes and errors the largest.

    Args:
        label: of the method.
        budget: as the specification says it; ``None`` where there is none.
        runs: finished ones, in the order of their seeds.
        interval: mean, deviation and interval of the metric over seeds.
        free: whether it has no factors, so that no budget holds it and it stands beside the rows of every budget.
        diverged: number of seeds that gave no result, as the training diverged: the mean is of the others.
    """

    label: str
    budget: str | int | None
    runs: tuple[Record, ...]
    interval: Interval
    free: bool = False
    diverged: int = 0

    @property
    def method(self) -> str:
        """The method with its hyper-parameters, after the budget turned its knob."""
        return self.runs[0]["method"]["text"]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run["identity"]["seed"] for run in self.runs)

    @property
    def values(self) -> tuple[float, ...]:
        """The metric of every seed."""
        return tuple(number(run["metric"]["value"]) for run in self.runs)

    @property
    def mean(self) -> float:
        return self.interval.mean

    @property
    def ends(self) -> tuple[float, float]:
        """What is printed and drawn around the mean: the interval; of two seeds both values, since Student's interval
        of two is 12.7 standard errors long on each side, further than an accuracy can be."""
        if len(self.values) == 2:
            return min(self.values), max(self.values)
        return self.interval.low, self.interval.high

    @property
    def std(self) -> float:
        """Sample standard deviation over seeds; NaN for a single one."""
        return self.interval.std

    @property
    def lr(self) -> float:
        return self.runs[0]["identity"]["lr"]

    @property
    def trainable(self) -> int:
        return self.runs[0]["parameters"]["trainable"]

    @property
    def factors(self) -> int:
        return self.runs[0]["parameters"]["factors"]

    @property
    def throughput(self) -> float | None:
        return _over(statistics.median, (run["throughput"]["per_second"] for run in self.runs))

    @property
    def forgotten(self) -> tuple[float, ...]:
        """What the base lost, after − before, in every run in which it was measured."""
        return tuple(number(f["after"]) - number(f["before"]) for run in self.runs if (f := run["forgetting"]))

    @property
    def forgetting(self) -> float | None:
        """The mean of it over seeds."""
        return _over(statistics.fmean, self.forgotten)

    def median(self, key: str) -> float | None:
        return _over(statistics.median, (run[key] for run in self.runs))

    def mean_of(self, metric: str) -> float | None:
        """The mean over seeds of any metric of the test split."""
        return _over(statistics.fmean, (_mean(run, metric) for run in self.runs if metric in run["items"]))

    def largest(self, key: str) -> float | None:
        return _over(max, (run[key] for run in self.runs))


@dataclass(frozen=True)
class Results:
    """One comparison as it lies in its store.

    Args:
        records: of the runs that count.
        trials: of learning rates.
        comparison: specification and provenance; ``None`` where the file is missing.
        damaged: files that could not be read.
        older: runs that others took the place of.
    """

    records: Sequence[Record]
    trials: Sequence[Record] = ()
    comparison: Record | None = None
    damaged: Sequence[Damaged] = field(default=())
    older: Sequence[Record] = ()

    @property
    def spec(self) -> Record:
        return (self.comparison or {}).get("spec") or {}

    @property
    def baseline(self) -> str | None:
        """What the others are compared with: what was asked for, else the first that is LoRA, else the first of all."""
        methods = self.spec.get("methods") or []
        first = [entry["label"] for entry in methods if entry["method"]["name"] == "lora"]
        return self.spec.get("baseline") or next(iter([*first, *(entry["label"] for entry in methods)]), None)

    @property
    def confidence(self) -> float:
        return self.spec.get("confidence") or 0.95

    @cached_property
    def metric(self) -> str:
        """The metric by which methods are ranked; "metric" where no run ended well."""
        return next((record["metric"]["name"] for record in self.records if finished(record)), "metric")

    @property
    def higher(self) -> bool:
        return higher_is_better(self.metric)

    @cached_property
    def percent(self) -> bool:
        """Whether the metric is a share and is shown in per cent."""
        values = [value for row in self.rows for value in row.values if math.isfinite(value)]
        return self.higher and all(0 <= value <= 1 for value in values)

    @cached_property
    def unit(self) -> str:
        """What the throughput counts."""
        return next((record["throughput"]["unit"] for record in self.records if finished(record)), "examples")

    @cached_property
    def budgets(self) -> list[str | int | None]:
        """The budgets of methods with factors, in the order of the specification, or else of the records."""
        found = dict.fromkeys(r["identity"]["budget"] for r in self.records if not _free(r))
        return [b for b in self.spec.get("budgets") or [] if b in found] or list(found) or [None]

    @cached_property
    def rows(self) -> list[Row]:
        """A row per method and budget, best first; one that diverged with any seed comes last."""
        lost = Counter((r["label"], r["identity"]["budget"]) for r in self.records if "diverged" in r)
        groups: dict[tuple[str, Any], list[Record]] = {}
        for record in filter(finished, self.records):
            groups.setdefault((record["label"], record["identity"]["budget"]), []).append(record)
        found = []
        for (label, budget), records in groups.items():
            runs = tuple(sorted(records, key=lambda record: record["identity"]["seed"]))
            values = [number(run["metric"]["value"]) for run in runs]
            spread = interval(values, self.confidence)
            found.append(Row(label, budget, runs, spread, _free(runs[0]), lost[label, budget]))
        sign = -1 if self.higher else 1

        def place(row: Row) -> tuple[bool, float, str]:
            last = math.isnan(row.mean)
            return last or row.diverged > 0, 0 if last else sign * row.mean, row.label

        return sorted(found, key=place)

    def baseline_of(self, row: Row) -> Row | None:
        """The row that this one is compared with; ``None`` where there is none, or one for each of several budgets."""
        found = [r for r in self.rows if r.label == self.baseline and (r.free or row.free or r.budget == row.budget)]
        return found[0] if len(found) == 1 else None

    @cached_property
    def differences(self) -> dict[str | int | None, list[Difference] | str]:
        """By budget: every method against the baseline on the same test items, or why that cannot be said."""
        found: dict[str | int | None, list[Difference] | str] = {}
        for budget in self.budgets:
            scores = self._scores(budget)
            if self.baseline is None:
                found[budget] = "no baseline is named: the folder has no comparison.json"
            elif self.baseline not in scores:
                found[budget] = f"the baseline {self.baseline} {self._lacks()}"
            else:
                try:
                    found[budget] = differences(scores, self.baseline, confidence=self.confidence)
                except ValueError as error:
                    found[budget] = str(error)
        return found

    @cached_property
    def standings(self) -> dict[str | int | None, list[Standing]]:
        """By budget: every method among all, best first; none where that cannot be said."""
        found: dict[str | int | None, list[Standing]] = {}
        for budget in self.budgets:
            with suppress(ValueError):  # other test items for one than for another: ``differences`` says it
                found[budget] = standings(self._scores(budget), self.higher, self.confidence)
        return found

    def _scores(self, budget: str | int | None) -> dict[str, dict[int, list[float]]]:
        """By label and seed, the metric of every test item."""
        return {
            row.label: {run["identity"]["seed"]: list(map(number, run["items"][self.metric])) for run in row.runs}
            for row in self.rows
            if (row.free or row.budget == budget) and not row.diverged  # the seeds that are left are no sample
        }

    @cached_property
    def searches(self) -> list[Search]:
        """The searches in the order of the rows."""
        order = {(row.label, row.budget): i for i, row in enumerate(self.rows)}
        groups: dict[tuple[str, Any], list[Record]] = {}
        for trial in self.trials:
            groups.setdefault((trial["label"], trial["identity"]["budget"]), []).append(trial)
        chosen = {(row.label, row.budget): row.lr for row in self.rows}
        whole = max(record["identity"]["epochs"] for record in self.records)
        found = []
        for key in sorted(groups, key=lambda key: (order.get(key, len(order)), *map(str, key))):
            rates: dict[float, list[Record]] = {}
            for trial in groups[key]:
                rates.setdefault(trial["identity"]["lr"], []).append(trial)
            metric = next((trial["metric"] for trial in groups[key] if "metric" in trial), self.metric)
            points = tuple(tried(rates[rate], whole) for rate in sorted(rates))
            known = any(point.value is not None for point in points)
            found.append(Search(*key, metric, points, chosen.get(key) if known else None, _free(groups[key][0])))
        return found

    def without(self, what: str) -> list[str]:
        """The runs without a result, for a reason: "error", "undefined" or "diverged"; equal ones are one line."""
        groups: dict[tuple[str, str], list[str]] = {}
        for record in self.records:
            if what in record:
                name = self.name(record["label"], record["identity"]["budget"])
                groups.setdefault((name, record[what]), []).append(str(record["identity"]["seed"]))
        return [f"{name}, {_seeds(seeds)}: {reason}" for (name, reason), seeds in groups.items()]

    def name(self, label: str, budget: str | int | None) -> str:
        """What a row is called: its label, and its budget where there are several.

        A row without factors has its label alone, and a difference of it the budget whose rows it is compared with.
        """
        if len(self.budgets) == 1:
            return label
        if label in self._free:
            return label if budget is None else f"{label} against {budget}"
        return f"{label} at {budget or 'no budget'}"

    def _lacks(self) -> str:
        diverged = any(r["label"] == self.baseline for r in self.records if "diverged" in r)
        return "diverged" if diverged else "has no finished run"

    @cached_property
    def _free(self) -> set[str]:
        return {record["label"] for record in self.records if _free(record)}

    @cached_property
    def title(self) -> str:
        """What was compared on what: "efficientnet-lite0 on mnist5k, budget 1.5%, 3 seeds"."""
        identity = self.records[0]["identity"]
        seeds = len({record["identity"]["seed"] for record in self.records})
        budgets = [str(budget) for budget in self.budgets if budget is not None]
        budget = f", budget{'s' if len(budgets) > 1 else ''} {', '.join(budgets)}" if budgets else ""
        return f"{identity['model']} on {identity['task']['name']}{budget}, {seeds} seed{'s' if seeds > 1 else ''}"


def read(store: Store, metric: str | None = None) -> Results:
    """Read a comparison; damaged files, and runs that newer ones took the place of, are left out and named.

    Args:
        store: of the comparison.
        metric: that methods are ranked by, any that the test split gave; ``None`` is the task's own.

    Raises:
        ValueError: the store holds no run that could be read, or no such metric; the near miss is named.
    """
    runs, damaged = store.read("runs", partial(check, "runs"))
    trials, more = store.read("trials", partial(check, "trials"))
    damaged = [Damaged(file.path.removeprefix(f"{store.address}/"), file.reason) for file in [*damaged, *more]]
    comparison = None
    try:
        if (comparison := store.comparison()) is not None:
            check_comparison(comparison)
    except ValueError as error:  # the runs say what was run; what was to be run is not known
        comparison = None
        damaged.append(Damaged("comparison.json", str(error).removeprefix(f"{store.address}/comparison.json: ")))
    if not runs:
        named = "".join(f"; {file.path}: {file.reason}" for file in damaged)
        raise ValueError(f"{store.address} is not a comparison: it holds no run{named}")
    if metric is not None:
        _rank_by(metric, list(filter(finished, runs)))
    if len(metrics := sorted({run["metric"]["name"] for run in runs if finished(run)})) > 1:
        raise ValueError(f"{store.address} holds runs with different metrics: {', '.join(metrics)}")
    records, older = newest(runs)
    return Results(records, trials, comparison, damaged, older)


def _rank_by(metric: str, runs: Sequence[Record]) -> None:
    for run in runs:
        if metric not in run["items"]:
            raise ValueError(f"no run was judged by {metric!r}: {near_miss(metric, run['items'])}")
        run["metric"] = {"name": metric, "value": _mean(run, metric)}


def _mean(run: Record, metric: str) -> float:
    return statistics.fmean(map(number, run["items"][metric]))


def _free(record: Record) -> bool:
    return record["identity"]["budget"] is None and without_factors(record["identity"]["method"])


def number(value: float | None) -> float:
    """A number of a record: JSON has no NaN, so a loss that diverged is null there."""
    return math.nan if value is None else float(value)


def _over(function: Any, values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return function(known) if known else None


def _seeds(seeds: Sequence[str]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"
