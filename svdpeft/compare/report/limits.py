"""What the results do not show, and where they come from: said as plainly as what they show."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from svdpeft.compare import budget as budgets
from svdpeft.compare.records import finished, without_factors
from svdpeft.compare.report.columns import metric_text, spread_text
from svdpeft.compare.report.results import Results, Row
from svdpeft.compare.statistics import conclusion
from svdpeft.compare.store import Record

FEW = 5  # seeds below which the interval is much wider than the spread that it is made from
LISTED = 12  # names in one sentence
MACHINE = ("device", "processor", "threads", "platform")
USED = 0.8  # share of the budget below which a method is named


def shown(results: Results) -> list[str]:
    """Return what the results show: the best mean, the tests against the baseline by budget, the Pareto front."""
    if not results.rows or math.isnan(results.rows[0].mean):
        return []  # no run ended well
    texts = [_best(results)]
    for budget, found in results.differences.items():
        if not isinstance(found, str) and found:
            at = f"At a budget of {budget}: " if len(results.budgets) > 1 else ""
            texts.append(at + conclusion(found, results.metric))
    names = [results.name(row.label, row.budget) for row in pareto(results)]
    return [*texts, f"No method is as good with fewer trainable parameters than these: {_listed(names)}."]


def pareto(results: Results) -> list[Row]:
    """Return the rows that no other beats with as few trainable parameters, from the fewest."""
    sign = 1 if results.higher else -1
    front: list[Row] = []
    for row in sorted(results.rows, key=lambda row: (row.trainable, -sign * row.mean)):
        if not math.isnan(row.mean) and (not front or sign * row.mean > sign * front[-1].mean):
            front.append(row)
    return front


def limits(results: Results) -> list[str]:
    """Return what the results do not show, a sentence each."""
    if not results.rows:
        return ["No run ended well, so nothing can be compared.", *_missing(results)]
    return [
        *_seeds(results),
        *_tests(results),
        *_missing(results),
        *_search(results),
        *_budgets(results),
        *_places(results),
        _scope(results),
    ]


def provenance(results: Results) -> list[tuple[str, list[str]]]:
    """Return versions, revisions, machines and dates of the runs; several values of one are told with their runs."""

    def values(get: Callable[[Record], Any]) -> list[str]:
        counts = Counter(str(value) for record in results.records if (value := get(record)) is not None)
        return [value if len(counts) == 1 else f"{value} ({_runs(n)})" for value, n in sorted(counts.items())]

    packages = sorted({name for record in results.records for name in record["versions"]})
    found = [("svdpeft", values(lambda r: r["svdpeft"])), ("git revision", values(_revision))]
    found += [("python", values(lambda r: r["python"]))]
    found += [(name, values(lambda r, name=name: r["versions"].get(name))) for name in packages]
    found += [(name, values(lambda r, name=name: r["machine"].get(name))) for name in MACHINE]
    days = sorted(str(record["date"])[:10] for record in results.records)
    found.append(("date", [days[0]] if days[0] == days[-1] else [f"{days[0]} to {days[-1]}"]))
    return [(name, texts) for name, texts in found if texts]


def _best(results: Results) -> str:
    unit = " %" if results.percent else ""

    def named(row: Row) -> str:
        return results.name(row.label, row.budget) + (" (the baseline)" if row.label == results.baseline else "")

    best, *others = [row for row in results.rows if not math.isnan(row.mean)]
    mean = f"the {'highest' if results.higher else 'lowest'} mean {results.metric}"
    tied = [row for row in others if metric_text(row.mean, results) == metric_text(best.mean, results)]
    if tied:
        names = _listed(named(row) for row in (best, *tied))
        text = f"{mean[:1].upper()}{mean[1:]}, {metric_text(best.mean, results)}{unit}, is shared by {names}"
    else:
        text = f"{named(best)} has {mean}, {spread_text(best, results)}{unit}"
    base = [row for row in others if row.label == results.baseline and row not in tied]
    return text + "".join(f"; {named(row)} has {spread_text(row, results)}{unit}" for row in base) + "."


def _seeds(results: Results) -> Iterator[str]:
    counts = {results.name(row.label, row.budget): len(row.values) for row in results.rows}
    most = max(counts.values())
    if most == 1:
        yield "There is one seed: how much of any difference is chance is not known, and no interval is given."
    elif most < FEW:
        from scipy import stats

        wide = stats.t.ppf((1 + results.confidence) / 2, most - 1)
        yield (
            f"{most} seeds are few: an interval is {wide:.1f} standard errors long on each side "
            f"(many seeds: {stats.norm.ppf((1 + results.confidence) / 2):.1f}), so only large differences can be seen."
        )
    if fewer := [f"{name} ({n} of {most})" for name, n in counts.items() if n < most]:
        yield f"Fewer seeds than the others: {_listed(fewer)}."
    if lost := [results.name(row.label, row.budget) for row in results.rows if math.isnan(row.mean)]:
        yield f"The metric is not a number for {_listed(lost)}: the training diverged."


def _tests(results: Results) -> Iterator[str]:
    for budget, found in results.differences.items():
        if isinstance(found, str):
            at = f" at a budget of {budget}" if len(results.budgets) > 1 else ""
            yield f"No method is tested against a baseline{at}: {found}."


def _missing(results: Results) -> Iterator[str]:
    reasons = (("error", "failed"), ("diverged", "diverged"), ("undefined", "not defined on this model"))
    for what, words in reasons:
        if found := [record for record in results.records if what in record]:
            names = dict.fromkeys(results.name(r["label"], r["identity"]["budget"]) for r in found)
            are = "is" if len(found) == 1 else "are"
            said = f"{are} {words}" if what == "undefined" else words
            rest = "; the other seeds of their methods stand last and are not tested" if what == "diverged" else ""
            yield f"{_runs(len(found))} {said} and {are} left out: {_listed(names)}{rest}."
    wanted = {
        (entry["label"], None if without_factors(entry["method"]) else budget, seed)
        for entry in results.spec.get("methods", ())
        for budget in results.spec["budgets"]
        for seed in results.spec["seeds"]
    }
    there = {(r["label"], r["identity"]["budget"], r["identity"]["seed"]) for r in results.records}
    if missing := wanted - there:
        yield f"{len(missing)} of {len(wanted)} runs are not there yet."
    rates = {(r["label"], r["identity"]["budget"]): r["identity"]["lr"] for r in results.records}
    old = Counter((r["label"], r["identity"]["budget"], r["identity"]["lr"]) for r in results.older)
    for (label, budget, lr), count in old.items():
        why = f" at another learning rate ({lr:g})" if lr != rates[label, budget] else ", done again,"
        runs, are = ("run", "is") if count == 1 else ("runs", "are")
        yield f"{count} older {runs} of {results.name(label, budget)}{why} {are} left out."
    if results.damaged:
        count = len(results.damaged)
        yield f"{count} damaged file{'s are' if count > 1 else ' is'} left out."


def _search(results: Results) -> Iterator[str]:
    if not results.searches:
        yield "Learning rates were not searched: each method has the one it was given, and another may suit it better."
        return
    often = (results.spec.get("search") or {}).get("seeds", 1)
    trainings = f"{often} trainings" if often > 1 else "one training"
    yield (
        f"A learning rate was judged on the validation split by {trainings}; with another seed, or on a finer grid, "
        "another may have been chosen."
    )
    if edges := [s for s in results.searches if s.edge]:
        names = (f"{results.name(s.label, s.budget)} ({s.edge}, {s.chosen:.2g})" for s in edges)
        yield f"The best rate lies at the edge of its grid, and a better one may lie outside: {_listed(names)}."
    searched = {(s.label, s.budget) for s in results.searches}
    for s in results.searches:
        if s.failure:
            reason = " ".join(s.failure.split()).rstrip(".")
            yield f"The search of {results.name(s.label, s.budget)} failed ({reason}); its own rate was used."
    if rest := [results.name(r.label, r.budget) for r in results.rows if (r.label, r.budget) not in searched]:
        yield f"No search was made for {_listed(rest)}."


def _budgets(results: Results) -> Iterator[str]:
    def used(row: Row) -> float:
        assert row.budget is not None
        return row.factors / budgets.parse(row.budget, row.runs[0]["parameters"]["base"])

    held = [row for row in results.rows if row.budget is not None]
    free = [row.label for row in results.rows if row.free]
    if below := [row for row in held if 0 < used(row) < USED]:
        names = (f"{results.name(row.label, row.budget)} ({100 * used(row):.0f} %)" for row in below)
        yield (
            f"Less than {100 * USED:.0f} % of the budget used, as a rank is a whole number and a pattern has an end: "
            f"{_listed(names)}."
        )
    if free and any(budget is not None for budget in results.budgets):
        yield f"Not held to the budget, as they have no factors: {_listed(free)}."


def _places(results: Results) -> Iterator[str]:
    runs = [record for record in results.records if finished(record)]
    machines = {tuple(str(r["machine"].get(name)) for name in MACHINE) for r in runs}
    if len(machines) > 1:
        yield f"The runs come from {len(machines)} machines or settings: times and memory compare only within one."
    if any(r["machine"]["device"] == "cpu" for r in runs):
        yield "On a CPU, allocators make peak memory differ by a few percent between runs of one method."
    versions = {
        (r["svdpeft"], str(r["git"] and r["git"]["revision"]), str(sorted(r["versions"].items()))) for r in runs
    }
    if len(versions) > 1:
        yield "The runs were made with more than one version of svdpeft or of a package (listed below)."
    if dirty := sum(bool(r["git"] and r["git"]["dirty"]) for r in runs):
        were = "was" if dirty == 1 else "were"
        yield f"{_runs(dirty)} of {len(runs)} {were} made from sources with uncommitted changes."


def _scope(results: Results) -> str:
    identity = results.records[0]["identity"]
    size = identity["task"].get("train_size")
    data = f"{size:,} training examples, " if size else ""
    epochs = results.spec.get("epochs", identity["epochs"])
    return (
        f"One model on one task ({data}{epochs:g} epoch{'s' if epochs != 1 else ''}): nothing is said of other models, "
        "tasks, or longer training."
    )


def _revision(record: Record) -> str | None:
    git = record["git"]
    return git and git["revision"][:12] + (" with uncommitted changes" if git["dirty"] else "")


def _listed(names: Iterable[str]) -> str:
    """Names in a sentence; of many the first, as the table has them all."""
    known = list(names)
    return ", ".join(known) if len(known) <= LISTED else f"{', '.join(known[:LISTED])} and {len(known) - LISTED} more"


def _runs(count: int) -> str:
    return f"{count} run{'s' if count > 1 else ''}"
