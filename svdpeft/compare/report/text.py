"""The report for a terminal, and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from svdpeft.compare.report.cells import (
    COMMAND,
    SEARCHED,
    STANDING,
    STOOD,
    STOPPED,
    as_run,
    compared,
    difference,
    left_out,
    runs_of_methods,
    searched,
    standing,
    stopped,
    table,
)
from svdpeft.compare.report.columns import columns, metric_heading, spread_meaning, spread_text
from svdpeft.compare.report.limits import limits, provenance, shown
from svdpeft.compare.report.results import Results
from svdpeft.compare.report.specification import bibtex, toml
from svdpeft.compare.statistics import sentences
from svdpeft.compare.store import Record

IN_TERMINAL = ("trainable", "attach", "step", "memory", "file", "merge")  # what 80 columns hold


def terminal(results: Results) -> Group:
    """Return the table for a terminal, for which 80 columns are enough, and what it shows."""
    lines = []
    for what, words in (("error", "failed"), ("diverged", "diverged"), ("undefined", "not defined")):
        lines += [f"{words}: {line}" for line in results.without(what)]
    lines += [f"damaged: {file.path}: {file.reason}" for file in results.damaged]
    shape = Table(title=Text(results.title), caption=Text("\n".join(lines)) if lines else None, box=None)
    shape.padding, shape.title_justify, shape.caption_justify = (0, 1, 0, 0), "left", "left"
    chosen = [column for column in columns(results) if column.key in IN_TERMINAL]
    cells = [
        [results.name(row.label, row.budget), spread_text(row, results), *(column.text(row) for column in chosen)]
        for row in results.rows
    ]
    headings = ["method", metric_heading(results), *(column.heading for column in chosen)]
    for i, heading in enumerate(headings):
        width = max((len(row[i]) for row in cells), default=0) if i else None  # a long label folds
        shape.add_column(heading, justify="right" if i else "left", min_width=width, overflow="fold")
    for row in cells:
        shape.add_row(*map(Text, row))
    return Group(shape, *(Text(f"\n{text}") for text in shown(results)))


def markdown(results: Results) -> str:
    """Return the report: what it shows and what not, the tables, how it was run, failures, versions, citations."""
    return "\n".join(_lines(results)).rstrip("\n") + "\n"


def _lines(results: Results) -> Iterator[str]:
    yield from [f"# {_plain(results.title)}", "", "## What the results show", ""]
    for text in shown(results) or ["Nothing: no run ended well."]:
        yield from [_plain(text), ""]
    yield from ["## What they do not show", "", *(f"- {_plain(text)}" for text in limits(results)), ""]
    if results.rows:
        yield from _main_table(results)
        yield from _differences(results)
        yield from _searches(results)
    yield from ["## As it was run", ""]
    yield from (_bullet(results, record) for record in runs_of_methods(results))
    if specification := toml(results):
        yield from ["", f"`specification.toml`, for `{COMMAND}`:", "", "```toml", specification.rstrip(), "```"]
    yield from ["", *_table(["what", "version"], [[name, "; ".join(texts)] for name, texts in provenance(results)]), ""]
    for heading, found in left_out(results):
        yield from [f"## {heading}", "", *(f"- {_plain(line)}" for line in found), ""]
    if entries := bibtex(results):
        yield from ["## To cite", "", "```bibtex", entries, "```"]


def _main_table(results: Results) -> Iterator[str]:
    found = table(results)
    cells = [[text(row) for _, text, _ in found] for row in results.rows]
    yield from ["## Table", "", *_table([heading for heading, _, _ in found], cells), ""]
    yield (
        f"{_plain(results.metric)}: {spread_meaning(results)}; deviation: sample standard deviation over seeds. "
        + "; ".join(f"{column.heading}: {column.meaning}" for column in columns(results))
        + "."
    )
    yield from ["", "![metric against trainable parameters](report.png)", "", "![loss in training](loss.png)", ""]


def _differences(results: Results) -> Iterator[str]:
    for budget, found in results.differences.items():
        if isinstance(found, str) or not found:
            continue
        at = f" at a budget of {budget or 'none'}" if len(results.budgets) > 1 else ""
        yield from [f"## Differences from {_plain(found[0].baseline)}{at}", ""]
        yield from [*_table(compared(results), [difference(d, budget, results) for d in found]), ""]
        count = f"{found[0].comparisons} comparison{'s' if found[0].comparisons > 1 else ''}"
        yield "Paired on the same test items and seeds; p corrected by Holm's method for "
        yield f"{count}; the interval is at the level at which it was tested. Ruled out above: no larger difference, by"
        yield "two one-sided tests with Holm's correction, for who named a margin before the runs."
        texts = sentences(found, results.metric, results.percent)
        yield from ["", *(f"- {_plain(text)}" for text in texts), ""]
    for budget, found in results.standings.items():
        if found:
            at = f" at a budget of {budget or 'none'}" if len(results.budgets) > 1 else ""
            yield from [f"## Every method among all{at}", ""]
            yield from [*_table(STANDING, [standing(each, budget, results) for each in found]), "", f"{STOOD}.", ""]


def _searches(results: Results) -> Iterator[str]:
    if not results.searches:
        return
    yield from [f"## Learning rates, by {_plain(results.searches[0].metric)} on the validation split", ""]
    yield from [*_table(SEARCHED, [searched(search, results) for search in results.searches]), ""]
    if stopped(results):
        yield from [f"Tried: {STOPPED}.", ""]


def _bullet(results: Results, record: Record) -> str:
    name, text, lr = as_run(record, results)
    return f"- {_plain(name)}: `{text.replace('`', ' ')}`, learning rate {lr}"


def _table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(_plain, headings)) + " |", "| --- |" + " ---: |" * (len(headings) - 1)]
    return lines + ["| " + " | ".join(map(_plain, row)) + " |" for row in cells]


def _plain(text: str) -> str:
    """Words of others as Markdown: one line, no cell border, no tag, no beginning of code."""
    return re.sub(r"([|`])", r"\\\1", re.sub(r"\s+", " ", text)).replace("<", "&lt;")
