"""The report for a terminal, and as Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from svdpeft.compare.report.columns import columns, metric_heading, metric_text, spread_text
from svdpeft.compare.report.limits import limits, provenance, shown
from svdpeft.compare.report.results import Results
from svdpeft.compare.report.specification import bibtex, toml
from svdpeft.compare.statistics import sentences

IN_TERMINAL = ("trainable", "attach", "step", "memory", "file", "merge")  # what 80 columns hold
COMMAND = "svdpeft compare specification.toml --out runs/again"


def terminal(results: Results) -> Group:
    """Return the table for a terminal, for which 80 columns are enough, and what it shows."""
    lines = []
    for what, words in (("error", "failed"), ("undefined", "not defined")):
        lines += [f"{words}: {line}" for line in results.without(what)]
    lines += [f"damaged: {file.path}: {file.reason}" for file in results.damaged]
    table = Table(title=Text(results.title), caption=Text("\n".join(lines)) if lines else None, box=None)
    table.padding, table.title_justify, table.caption_justify = (0, 1, 0, 0), "left", "left"
    chosen = [column for column in columns(results) if column.key in IN_TERMINAL]
    cells = [
        [results.name(row.label, row.budget), spread_text(row, results), *(column.text(row) for column in chosen)]
        for row in results.rows
    ]
    headings = ["method", metric_heading(results), *(column.heading for column in chosen)]
    for i, heading in enumerate(headings):
        width = max((len(row[i]) for row in cells), default=0) if i else None  # a long label folds
        table.add_column(heading, justify="right" if i else "left", min_width=width, overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    return Group(table, *(Text(f"\n{text}") for text in shown(results)))


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
    for heading, found in (
        ("Failed", results.without("error")),
        ("Not defined on this model", results.without("undefined")),
        ("Damaged files, left out", [f"{file.path}: {file.reason}" for file in results.damaged]),
    ):
        if found:
            yield from [f"## {heading}", "", *(f"- {_plain(line)}" for line in found), ""]
    if entries := bibtex(results):
        yield from ["## To cite", "", "```bibtex", entries, "```"]


def _main_table(results: Results) -> Iterator[str]:
    found = columns(results)
    several = len(results.budgets) > 1
    headings = ["method", *(["budget"] if several else []), metric_heading(results), "deviation", "seeds"]
    cells = [
        [
            row.label,
            *([str(row.budget or "none")] if several else []),
            spread_text(row, results),
            metric_text(row.std, results),
            str(len(row.values)),
            *(column.text(row) for column in found),
        ]
        for row in results.rows
    ]
    yield from ["## Table", "", *_table([*headings, *(column.heading for column in found)], cells), ""]
    yield (
        f"{_plain(results.metric)}: mean over seeds ± half of the {100 * results.confidence:g} % interval "
        "(Student's t); deviation: sample standard deviation over seeds. "
        + "; ".join(f"{column.heading}: {column.meaning}" for column in found)
        + "."
    )
    yield from ["", "![metric against trainable parameters](report.png)", "", "![loss in training](loss.png)", ""]


def _differences(results: Results) -> Iterator[str]:
    for budget, found in results.differences.items():
        if isinstance(found, str) or not found:
            continue
        at = f" at a budget of {budget}" if len(results.budgets) > 1 else ""
        yield from [f"## Differences from {_plain(found[0].baseline)}{at}", ""]
        points = "points" if results.percent else results.metric
        headings = ["method", points, "interval", "p", "p corrected", "real", "seeds that would settle it"]
        cells = [
            [
                d.label,
                metric_text(d.mean, results),
                f"{metric_text(d.low, results)} to {metric_text(d.high, results)}",
                *(f"{p:.2g}" if not math.isnan(p) else "–" for p in (d.p, d.p_corrected)),
                "yes" if d.real else "no",
                needed(d.seeds_needed, d.items_needed),
            ]
            for d in found
        ]
        yield from [*_table(headings, cells), ""]
        count = f"{found[0].comparisons} comparison{'s' if found[0].comparisons > 1 else ''}"
        yield "Paired on the same test items and seeds; p corrected by Holm's method for "
        yield f"{count}; the interval is at the level at which it was tested."
        yield from ["", *(f"- {_plain(text)}" for text in sentences(found, results.metric)), ""]


def needed(seeds: int | None, items: int | None) -> str:
    """How much more would settle a difference, in a few words.

    Example:
        >>> needed(12, None), needed(3, 4000), needed(None, None)
        ('12', '3, with 4,000 test items', '–')
    """
    if seeds is None:
        return "–"
    return f"{seeds:,}" if items is None else f"{seeds:,}, with {items:,} test items"


def _searches(results: Results) -> Iterator[str]:
    if not results.searches:
        return
    yield from [f"## Learning rates, by {_plain(results.searches[0].metric)} on the validation split", ""]
    cells = [
        [
            results.name(s.label, s.budget),
            "–" if s.chosen is None else f"{s.chosen:.3g}" + (f" ({s.edge} of the grid)" if s.edge else ""),
            ", ".join(f"{rate:.3g}: {'failed' if v is None else f'{v:.4g}'}" for rate, _, v in s.points),
        ]
        for s in results.searches
    ]
    yield from [*_table(["method", "chosen", "tried"], cells), ""]


def runs_of_methods(results: Results) -> list[dict]:
    """One run of each method and budget: a finished one where there is one."""
    found = {(r["label"], r["identity"]["budget"]): r for r in results.records}
    return list((found | {(row.label, row.budget): row.runs[0] for row in results.rows}).values())


def _bullet(results: Results, record: dict) -> str:
    text = record["method"]["text"] if "method" in record else record.get("error") or record["undefined"]
    code = re.sub(r"[\s`]+", " ", text)
    name = results.name(record["label"], record["identity"]["budget"])
    return f"- {_plain(name)}: `{code}`, learning rate {record['identity']['lr']:g}"


def _table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(_plain, headings)) + " |", "| --- |" + " ---: |" * (len(headings) - 1)]
    return lines + ["| " + " | ".join(map(_plain, row)) + " |" for row in cells]


def _plain(text: str) -> str:
    """Words of others as Markdown: one line, no cell border, no tag, no beginning of code."""
    return re.sub(r"([|`])", r"\\\1", re.sub(r"\s+", " ", text)).replace("<", "&lt;")
