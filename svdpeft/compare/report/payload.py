"""What the page's pictures are drawn from: plain JSON, small enough for hundreds of runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from svdpeft.compare.records import DRIFTS
from svdpeft.compare.report.columns import columns, metric_heading
from svdpeft.compare.report.results import Results, Row, number
from svdpeft.compare.report.tables import table_csv
from svdpeft.compare.store import Record

POINTS = 200  # of one loss curve at most
ALL_POINTS = 60_000  # of all loss curves together
LEAST_POINTS = 40  # of one loss curve, however many there are
MOMENTS = 40  # of one trajectory of the spectra
SITE_POINTS = 30_000  # of the trajectories of single sites: beyond that the page has their means only


def payload(results: Results) -> dict[str, Any]:
    """Return the page's data; what is not a number is ``None``."""
    scale = 100 if results.percent else 1
    found = columns(results)
    curves = sum(len(row.runs) for row in results.rows)
    points = max(LEAST_POINTS, min(POINTS, ALL_POINTS // max(1, curves)))
    return {
        "title": results.title,
        "metric": metric_heading(results),
        "percent": results.percent,
        "higher": results.higher,
        "baseline": results.baseline,
        "confidence": results.confidence,
        "budgets": [budget_text(budget) for budget in results.budgets],
        "columns": [{"key": c.key, "heading": c.heading, "meaning": c.meaning, "axis": c.axis} for c in found],
        "rows": [
            {
                "label": row.label,
                "budget": budget_text(row.budget, row.free),
                "name": results.name(row.label, row.budget),
                "seeds": row.seeds,
                "values": [_short(scale * value, 6) for value in row.values],
                "mean": _short(scale * row.mean, 6),
                "low": _short(scale * row.interval.low, 6),
                "high": _short(scale * row.interval.high, 6),
                "method": row.method,
                **{c.key: _short(c.value(row), 9) for c in found},
                "loss": _curves(row, points),
                "drift": _drift(row),
            }
            for row in results.rows
        ],
        "sites": _sites(results),
        "differences": [
            {
                "label": d.label,
                "budget": budget_text(budget),
                "name": results.name(d.label, budget),
                "mean": _short(scale * d.mean, 5),
                "low": None if d.same else _short(scale * d.low, 5),
                "high": None if d.same else _short(scale * d.high, 5),
                "real": d.real,
            }
            for budget, listed in results.differences.items()
            if not isinstance(listed, str)
            for d in listed
        ],
        "searches": [
            {
                "label": s.label,
                "budget": budget_text(s.budget, s.free),
                "name": results.name(s.label, s.budget),
                "metric": s.metric,
                "chosen": s.chosen,
                "edge": s.edge,
                "points": [
                    {"x": p.rate, "y": None if p.value is None else _short(p.value, 5), "why": p.why, "share": p.share}
                    for p in s.points
                ],
            }
            for s in results.searches
        ],
        "csv": table_csv(results),
    }


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Shorten a curve: each point becomes the mean of as many neighbours as are needed.

    Example:
        >>> thin([(1, 4.0), (2, 2.0), (3, 1.0)], 2)
        [(1.5, 3.0), (3.0, 1.0)]
    """
    width = -(-len(points) // most)
    if width <= 1:
        return list(points)
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [(statistics.fmean(step for step, _ in g), statistics.fmean(loss for _, loss in g)) for g in groups]


def mean_curve(runs: Sequence[Record], most: int = 10**9) -> list[tuple[float, float]]:
    """Return the mean over runs of the loss at every step that all of them have."""
    curves = [dict(_losses(run)) for run in runs]
    shared = [step for step in curves[0] if all(step in curve for curve in curves)]
    return thin([(step, statistics.fmean(curve[step] for curve in curves)) for step in shared], most)


def _losses(run: Record) -> list[tuple[float, float]]:
    """The loss of a run where it is a number."""
    return [(step, loss) for step, loss in run["loss"] if loss is not None]


def _curves(row: Row, most: int) -> dict[str, Any]:
    """The curve of the mean and of every seed; a seed's steps are left out where they are the mean's."""

    def pair(points: Sequence[tuple[float, float]]) -> tuple[list[Any], list[Any]]:
        return [_short(step, 6) for step, _ in points], [_short(loss, 4) for _, loss in points]

    steps, mean = pair(mean_curve(row.runs, most))
    seeds = [pair(thin(_losses(run), most)) for run in row.runs] if len(row.runs) > 1 else []
    own = [[losses] if theirs == steps else [losses, theirs] for theirs, losses in seeds]
    return {"steps": steps, "mean": mean, "seeds": own}


def _drift(row: Row) -> dict[str, Any] | None:
    """ΔΣ and ΔD of every seed, the mean over sites at each step."""
    runs = [run for run in row.runs if run.get("spectra")]
    if not runs:
        return None
    found: dict[str, Any] = {"seeds": [run["identity"]["seed"] for run in runs]}
    kept = [_moments(run["spectra"]["steps"]) for run in runs]
    found["steps"] = [[run["spectra"]["steps"][i] for i in ks] for run, ks in zip(runs, kept, strict=True)]
    for name in DRIFTS:
        found[name] = [[_mean(run["spectra"][name][i]) for i in ks] for run, ks in zip(runs, kept, strict=True)]
    return found


def _sites(results: Results) -> list[dict[str, Any]] | None:
    """ΔΣ and ΔD site by site, of the first seed of each row that has them; ``None`` where they are too many."""
    found, total = [], 0
    for i, row in enumerate(results.rows):
        run = next((run for run in row.runs if run.get("spectra")), None)
        if run is None:
            continue
        spectra = run["spectra"]
        kept = _moments(spectra["steps"])
        total += len(kept) * len(spectra["sites"])
        entry = {"row": i, "seed": run["identity"]["seed"], "steps": [spectra["steps"][k] for k in kept]}
        entry |= {name: [[_short(v, 4) for v in spectra[name][k]] for k in kept] for name in DRIFTS}
        found.append({**entry, "sites": spectra["sites"]})
    return found if total <= SITE_POINTS else None


def _moments(steps: Sequence[int]) -> list[int]:
    """Positions of at most ``MOMENTS`` steps, the first and the last among them."""
    if len(steps) <= MOMENTS:
        return list(range(len(steps)))
    return sorted({round(i * (len(steps) - 1) / (MOMENTS - 1)) for i in range(MOMENTS)})


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _short(statistics.fmean(known), 4) if known else None


def _short(value: float | None, digits: int) -> float | None:
    """A number with so many digits; an integer stays one."""
    value = number(value)
    if not math.isfinite(value):
        return None
    value = float(f"{value:.{digits}g}")
    return int(value) if value.is_integer() and abs(value) < 1e15 else value


def budget_text(budget: str | int | None, free: bool = False) -> str:
    """A budget as the page knows it; "" for what stands beside the rows of every budget."""
    return "" if free else "none" if budget is None else str(budget)
