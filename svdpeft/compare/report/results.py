"""What a store holds, put together: a row per method and budget, the differences from the baseline, the searches."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from svdpeft.compare.statistics import Difference, Interval, differences, interval
from svdpeft.compare.store import Damaged, Kind, Record, Store
from svdpeft.tasks.base import higher_is_better

IDENTITY = ("model", "task", "method", "lr", "seed", "budget", "epochs")
RECORDED = ("svdpeft", "git", "python", "versions", "machine", "date")
MEASURED = (
    *("method", "metric", "items", "parameters", "attach_seconds", "attach_warm_seconds", "step_seconds", "throughput"),
    *("peak_memory_bytes", "checkpoint_bytes", "merge_error", "reload_error", "distance", "forgetting", "loss"),
    "spectra",
)


def finished(record: Record) -> bool:
    """Whether a run has a result: it did not fail, and its method is defined on the model."""
    return "error" not in record and "undefined" not in record


@dataclass(frozen=True)
class Row:
    """All seeds of one method at one budget; times are medians, memory, bytes and errors the largest.

    Args:
        label: of the method.
        budget: as the specification says it; ``None`` where there is none.
        runs: finished ones, in the order of their seeds.
        interval: mean, deviation and interval of the metric over seeds.
    """

    label: str
    budget: str | int | None
    runs: tuple[Record, ...]
    interval: Interval

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
    def throughput(self) -> float:
        return statistics.median(run["throughput"]["per_second"] for run in self.runs)

    @property
    def forgetting(self) -> float | None:
        """What the base lost: after − before, the mean over seeds."""
        changes = [number(f["after"]) - number(f["before"]) for run in self.runs if (f := run["forgetting"])]
        return statistics.fmean(changes) if changes else None

    def median(self, key: str) -> float | None:
        return _over(statistics.median, (run[key] for run in self.runs))

    def largest(self, key: str) -> float | None:
        return _over(max, (run[key] for run in self.runs))


@dataclass(frozen=True)
class Search:
    """The learning rates that were tried for one method at one budget.

    Args:
        label: of the method.
        budget: as in ``Row``.
        metric: on the validation split.
        points: (learning rate, rung, value) of the last rung that the rate reached; ``None`` where it failed.
        chosen: the rate of the runs; ``None`` where no run is there yet.
    """

    label: str
    budget: str | int | None
    metric: str
    points: tuple[tuple[float, int, float | None], ...]
    chosen: float | None

    @property
    def edge(self) -> str:
        """Which edge of the grid the chosen rate lies at: "lowest", "highest" or ""."""
        rates = [rate for rate, _, _ in self.points]
        if len(rates) < 2 or self.chosen not in (rates[0], rates[-1]):
            return ""
        return "lowest" if self.chosen == rates[0] else "highest"


@dataclass(frozen=True)
class Results:
    """One comparison as it lies in its store.

    Args:
        records: of runs.
        trials: of learning rates.
        comparison: specification and provenance; ``None`` where the file is missing.
        damaged: files that could not be read.
    """

    records: Sequence[Record]
    trials: Sequence[Record] = ()
    comparison: Record | None = None
    damaged: Sequence[Damaged] = field(default=())

    @property
    def spec(self) -> Record:
        return (self.comparison or {}).get("spec") or {}

    @property
    def baseline(self) -> str | None:
        return self.spec.get("baseline")

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
        """The budgets in the order of the specification, or else of the records."""
        found = dict.fromkeys(record["identity"]["budget"] for record in self.records)
        return [b for b in self.spec.get("budgets") or [] if b in found] or list(found)

    @cached_property
    def rows(self) -> list[Row]:
        """A row per method and budget, best first; a mean that is no number comes last."""
        groups: dict[tuple[str, Any], dict[int, Record]] = {}
        for record in sorted(self.records, key=lambda record: record.get("date", "")):
            if finished(record):  # of two runs with one seed the newer counts
                key = record["label"], record["identity"]["budget"]
                groups.setdefault(key, {})[record["identity"]["seed"]] = record
        found = []
        for (label, budget), seeds in groups.items():
            runs = tuple(seeds[seed] for seed in sorted(seeds))
            values = [number(run["metric"]["value"]) for run in runs]
            found.append(Row(label, budget, runs, interval(values, self.confidence)))
        sign = -1 if self.higher else 1
        return sorted(found, key=lambda r: (math.isnan(r.mean), 0 if math.isnan(r.mean) else sign * r.mean, r.label))

    @cached_property
    def differences(self) -> dict[str | int | None, list[Difference] | str]:
        """By budget: every method against the baseline on the same test items, or why that cannot be said."""
        found: dict[str | int | None, list[Difference] | str] = {}
        for budget in self.budgets:
            scores = {
                row.label: {run["identity"]["seed"]: list(map(number, run["items"][self.metric])) for run in row.runs}
                for row in self.rows
                if row.budget == budget
            }
            if self.baseline is None:
                found[budget] = "no baseline is named: the folder has no comparison.json"
            elif self.baseline not in scores:
                found[budget] = f"the baseline {self.baseline} has no finished run"
            else:
                try:
                    found[budget] = differences(scores, self.baseline, confidence=self.confidence)
                except ValueError as error:
                    found[budget] = str(error)
        return found

    @cached_property
    def searches(self) -> list[Search]:
        """The searches in the order of the rows."""
        order = {(row.label, row.budget): i for i, row in enumerate(self.rows)}
        groups: dict[tuple[str, Any], list[Record]] = {}
        for trial in self.trials:
            groups.setdefault((trial["label"], trial["identity"]["budget"]), []).append(trial)
        chosen = {(row.label, row.budget): row.lr for row in self.rows}
        found = []
        for key in sorted(groups, key=lambda key: (order.get(key, len(order)), *map(str, key))):
            last: dict[float, tuple[int, float | None]] = {}
            for trial in sorted(groups[key], key=lambda trial: trial["rung"]):
                last[trial["identity"]["lr"]] = (trial["rung"], trial.get("value"))
            metric = next((trial["metric"] for trial in groups[key] if "metric" in trial), self.metric)
            points = tuple((rate, *last[rate]) for rate in sorted(last))
            found.append(Search(*key, metric, points, chosen.get(key)))
        return found

    def without(self, what: str) -> list[str]:
        """The runs without a result, for one of two reasons: "error" or "undefined"; equal ones are one line."""
        groups: dict[tuple[str, str], list[str]] = {}
        for record in self.records:
            if what in record:
                name = self.name(record["label"], record["identity"]["budget"])
                groups.setdefault((name, record[what]), []).append(str(record["identity"]["seed"]))
        return [f"{name}, {_seeds(seeds)}: {reason}" for (name, reason), seeds in groups.items()]

    def name(self, label: str, budget: str | int | None) -> str:
        """What a row is called: its label, and its budget where there are several."""
        return f"{label} at {budget or 'no budget'}" if len(self.budgets) > 1 else label

    @cached_property
    def title(self) -> str:
        """What was compared on what: "efficientnet-lite0 on mnist5k, budget 1.5%, 3 seeds"."""
        identity = self.records[0]["identity"]
        seeds = len({record["identity"]["seed"] for record in self.records})
        budgets = [str(budget) for budget in self.budgets if budget is not None]
        budget = f", budget{'s' if len(budgets) > 1 else ''} {', '.join(budgets)}" if budgets else ""
        return f"{identity['model']} on {identity['task']['name']}{budget}, {seeds} seed{'s' if seeds > 1 else ''}"


def read(store: Store) -> Results:
    """Read a comparison; damaged files are skipped and named.

    Raises:
        ValueError: the store holds no run that could be read.
    """
    found: dict[Kind, list[Record]] = {}
    damaged: list[Damaged] = []
    for kind in ("runs", "trials"):
        read, broken = store.read(kind)
        lacks = [(record, _lacks(kind, record)) for record in read]
        found[kind] = [record for record, name in lacks if name is None]
        damaged += [Damaged(file.path.removeprefix(f"{store.address}/"), file.reason) for file in broken]
        damaged += [
            Damaged(f"{kind}: {record.get('label')}, seed {record['identity'].get('seed')}", f"has no {name!r}")
            for record, name in lacks
            if name is not None
        ]
    try:
        comparison = store.comparison()
    except ValueError as error:
        comparison = None
        damaged.append(Damaged("comparison.json", str(error).removeprefix(f"{store.address}/comparison.json: ")))
    if not found["runs"]:
        named = "".join(f"; {file.path}: {file.reason}" for file in damaged)
        raise ValueError(f"{store.address} is not a comparison: it holds no run{named}")
    return Results(found["runs"], found["trials"], comparison, damaged)


def _lacks(kind: Kind, record: Record) -> str | None:
    """The first field that a record should have and has not, as one of another version may."""
    wanted = ("rung",) if kind == "trials" else RECORDED if not finished(record) else (*RECORDED, *MEASURED)
    missing = [name for name in ("label", *wanted) if name not in record]
    return next(iter([*missing, *(name for name in IDENTITY if name not in record["identity"])]), None)


def number(value: float | None) -> float:
    """A number of a record: JSON has no NaN, so a loss that diverged is null there."""
    return math.nan if value is None else float(value)


def _over(function: Any, values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return function(known) if known else None


def _seeds(seeds: Sequence[str]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"
