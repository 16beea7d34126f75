"""What the tables of the Markdown and of the page have in common: their headings, and their cells as text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from svdpeft.compare.report.columns import columns, metric_heading, metric_text, spread_text
from svdpeft.compare.report.results import Results, Row
from svdpeft.compare.report.search import Search
from svdpeft.compare.statistics import Difference, Standing
from svdpeft.compare.store import Record

COMMAND = "svdpeft compare specification.toml --out runs/again"
WORDS = ("real", "note", "at an edge", "tried", "as it was run", "version")  # columns of words, not of numbers
SEARCHED = ("method", "chosen", "at an edge", "tried")
STANDING = ("method", "ranks left", "over the mean", "to be expected", "interval")
STOOD = (
    "Ranks left: those that no pairwise test excludes, all at once (Bonferroni over the pairs). Over the mean: of all "
    "methods here. To be expected: how much of that a new comparison would show (the best of many was lucky, too), "
    "with the interval of each"
)
STOPPED = (
    "in brackets: the share of the epochs after which a rate was stopped, so that its value compares with no other's"
)


def table(results: Results) -> list[tuple[str, Callable[[Row], str], Callable[[Row], Any]]]:
    """Return the columns of the main table: heading, text, and what is sorted by."""

    def budget(row: Row) -> str:
        return "–" if row.free else str(row.budget or "none")

    return [
        ("method", lambda row: row.label, lambda row: row.label),
        *([("budget", budget, budget)] if len(results.budgets) > 1 else []),
        (metric_heading(results), lambda row: spread_text(row, results), lambda row: row.mean),
        ("deviation", lambda row: metric_text(row.std, results), lambda row: row.std),
        ("seeds", _seeds, lambda row: len(row.values)),
        *((column.heading, column.text, column.value) for column in columns(results)),
    ]


def _seeds(row: Row) -> str:
    return str(len(row.values)) + (f", {row.diverged} more diverged" if row.diverged else "")


def compared(results: Results) -> tuple[str, ...]:
    """Return the headings of a table of differences."""
    unit = "points" if results.percent else results.metric
    return (
        "method",
        unit,
        "interval",
        "p",
        "p corrected",
        "real",
        "ruled out above",
        "seeds",
        "seeds that would settle it",
        "note",
    )


def difference(d: Difference, budget: str | int | None, results: Results) -> tuple[str, ...]:
    """Return the cells of one."""
    low, high = metric_text(d.low, results), metric_text(d.high, results)
    return (
        results.name(d.label, budget),
        metric_text(d.mean, results),
        "equal on every item" if d.same else "–" if math.isnan(d.low) else f"{low} to {high}",
        *(f"{p:.2g}" if not math.isnan(p) else "–" for p in (d.p, d.p_corrected)),
        "yes" if d.real else "no",
        metric_text(d.within, results),
        str(d.seeds),
        needed(d.seeds_needed, d.items_needed),
        d.note,
    )


def standing(each: Standing, budget: str | int | None, results: Results) -> tuple[str, ...]:
    """Return the cells of one method among all."""
    low, high = metric_text(each.low, results), metric_text(each.high, results)
    return (
        results.name(each.label, budget),
        str(each.best) if each.best == each.worst else f"{each.best} to {each.worst}",
        metric_text(each.lead, results),
        metric_text(each.expected, results),
        "–" if math.isnan(each.low) else f"{low} to {high}",
    )


def needed(seeds: int | None, items: int | None) -> str:
    """How much more would settle a difference, in a few words.

    Example:
        >>> needed(12, None), needed(3, 4000), needed(None, None)
        ('12', '3, with 4,000 test items', '–')
    """
    if seeds is None:
        return "–"
    return f"{seeds:,}" if items is None else f"{seeds:,}, with {items:,} test items"


def searched(search: Search, results: Results) -> tuple[str, ...]:
    """Return the cells of one search; a rate that halving stopped has the share of the epochs that it got."""
    tried = []
    for point in search.points:
        early = f" ({100 * point.share:.3g} %)" if point.share < 1 else ""
        tried.append(f"{point.rate:.3g}: " + (point.why or f"{point.value:.4g}") + early)
    whys = {point.why for point in search.points}
    return (
        results.name(search.label, search.budget),
        "–" if search.chosen is None else f"{search.chosen:.3g}",
        f"{search.edge} of its grid: a better one may lie outside" if search.edge else "",
        next(iter(whys)) if len(whys) == 1 and "" not in whys else ", ".join(tried),
    )


def stopped(results: Results) -> bool:
    """Whether a search stopped some rates before the end."""
    return any(point.share < 1 for search in results.searches for point in search.points)


def as_run(record: Record, results: Results) -> tuple[str, str, str]:
    """Return a method's name, the method with its hyper-parameters or why there is none, and its learning rate."""
    why = (record[reason] for reason in ("error", "undefined", "diverged") if reason in record)
    text = record["method"]["text"] if "method" in record else next(why)
    name = results.name(record["label"], record["identity"]["budget"])
    return name, re.sub(r"\s+", " ", text), f"{record['identity']['lr']:g}"


def runs_of_methods(results: Results) -> list[Record]:
    """One run of each method and budget: a finished one where there is one."""
    found = {(r["label"], r["identity"]["budget"]): r for r in results.records}
    return list((found | {(row.label, row.budget): row.runs[0] for row in results.rows}).values())


def left_out(results: Results) -> list[tuple[str, list[str]]]:
    """Return headings, and what was left out for that reason."""
    found = [
        ("Failed", results.without("error")),
        ("Diverged", results.without("diverged")),
        ("Not defined on this model", results.without("undefined")),
        ("Damaged files", [f"{file.path}: {file.reason}" for file in results.damaged]),
    ]
    return [(heading, lines) for heading, lines in found if lines]
