"""One page with everything: its tables are HTML, and its pictures are drawn by the scripts that are written into it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template

from svdpeft.compare.report.cells import (
    COMMAND,
    SEARCHED,
    STANDING,
    STOOD,
    STOPPED,
    WORDS,
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
from svdpeft.compare.report.columns import columns, metric_heading, spread_meaning
from svdpeft.compare.report.limits import limits, provenance, shown
from svdpeft.compare.report.payload import budget_text, payload
from svdpeft.compare.report.results import Results, Row
from svdpeft.compare.report.specification import bibtex, toml
from svdpeft.compare.statistics import sentences

SCRIPTS = ("vendor/d3.min.js", "vendor/plot.umd.min.js", "charts.js", "app.js")
BAR = (130, 20)  # pixels of the picture of an interval
Of = tuple[str, str]  # label and budget


def page(results: Results) -> str:
    """Return the page. The same results give the same bytes; nothing in it is loaded from elsewhere.

    Whatever the records say is escaped, and the browser is told to run the scripts of this file and no other.
    """
    scripts = [_asset(name) for name in SCRIPTS]
    parts = {
        "hashes": " ".join(f"'sha256-{_digest(script)}'" for script in scripts),
        "style": _asset("style.css"),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
        "data": _json(payload(results)),
        "title": escape(results.title),
        "facts": _facts(results),
        "shown": _shown(results),
        "limits": "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in limits(results)) + "</ul>",
        "table": _main_table(results) if results.rows else "",
        "baseline": escape(str(results.baseline)),
        "metric": escape(results.metric[:1].upper() + results.metric[1:]),
        "confidence": f"{100 * results.confidence:g}",
        "differences": _differences(results),
        "search_metric": escape(results.searches[0].metric if results.searches else ""),
        "search": _searches(results),
        "problems": _problems(results),
        "again": _again(results),
        "bibtex": escape(bibtex(results)),
    }
    there = {
        "rows": bool(results.rows),
        "budgets": len(results.budgets) > 1,
        "differences": any(found and not isinstance(found, str) for found in results.differences.values()),
        "loss": any(run["loss"] for row in results.rows for run in row.runs),
        "search": bool(results.searches),
        "drift": any(run["spectra"] for row in results.rows for run in row.runs),
        "cite": bool(parts["bibtex"]),
    }
    hidden = {f"{name}_hidden": "" if is_there else "hidden" for name, is_there in there.items()}
    return Template(_asset("template.html")).substitute(parts | hidden | {"nav": _nav(results, there)})


def _asset(name: str) -> str:
    return files("svdpeft.compare.report").joinpath("page").joinpath(name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(value: object) -> str:
    """JSON that no HTML parser takes for a tag."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _nav(results: Results, there: Mapping[str, bool]) -> str:
    sections = (
        ("runs", "Results", there["rows"]),
        ("differences", "Differences", there["differences"]),
        ("cost", "Cost", there["rows"]),
        ("loss", "Loss", there["loss"]),
        ("search", "Learning rates", there["search"]),
        ("drift", "Spectra", there["drift"]),
        ("problems", "Left out", bool(left_out(results))),
        ("again", "Run it again", True),
        ("cite", "Cite", there["cite"]),
    )
    return "".join(f'<li><a href="#{name}">{text}</a></li>' for name, text, is_there in sections if is_there)


def _facts(results: Results) -> str:
    records = results.records
    items = {len(run["items"][results.metric]) for row in results.rows for run in row.runs}
    dates = next(texts for name, texts in provenance(results) if name == "date")
    facts = {
        "methods": f"{len({record['label'] for record in records})}",
        "runs": f"{len(records)}",
        "seeds": f"{len({record['identity']['seed'] for record in records})}",
        "test items": " or ".join(f"{n:,}" for n in sorted(items)),
        "measured on": ", ".join(sorted({str(record["machine"]["device"]) for record in records})),
        "date": dates[0],
        "svdpeft": ", ".join(sorted({record["svdpeft"] for record in records})),
    }
    return (
        '<dl class="facts">'
        + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items() if text)
        + "</dl>"
    )


def _shown(results: Results) -> str:
    texts = shown(results) or ["Nothing: no run ended well."]
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _main_table(results: Results) -> str:
    found, first = table(results), results.rows[0]
    metric = metric_heading(results)
    heads = []
    for heading, _, value in found:
        sort = ("descending" if results.higher else "ascending") if heading == metric else "none"
        heads.append(_head(heading, "words" if isinstance(value(first), str) else "number", sort))
        if heading == metric:
            heads.append(f'<th scope="col">{100 * results.confidence:g} % interval</th>')
    domain, body = _domain(results), []
    for i, row in enumerate(results.rows):
        cells = [f'<th scope="row" data-v="{escape(row.label)}">{escape(row.label)}</th>']
        for heading, text, value in found[1:]:
            cells.append(_cell(text(row), value(row)))
            if heading == metric:
                cells.append(f'<td class="bar">{_bar(row, domain, results)}</td>')
        base = ' class="base"' if row.label == results.baseline else ""
        body.append(f'<tr data-row="{i}"{base}>{"".join(cells)}</tr>')
    interval = f"{100 * results.confidence:g} % interval"
    meaning = {
        metric: spread_meaning(results),
        interval: "the same drawn, with a ring for each seed; an arrow where it is cut",
        "deviation": "sample standard deviation over seeds",
        **{column.heading: column.meaning for column in columns(results)},
    }
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in meaning.items())
    return (
        '<div class="scroll" role="region" tabindex="0" aria-label="Table of results">'
        '<table class="sortable"><caption>Best first. Press a heading to sort.</caption>'
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        f'<details><summary>What the columns mean</summary><dl class="meaning">{entries}</dl></details>'
    )


def _head(text: str, kind: str, sort: str) -> str:
    return f'<th scope="col" aria-sort="{sort}" data-kind="{kind}"><button type="button">{escape(text)}</button></th>'


def _cell(text: str, value: float | str | None) -> str:
    """A cell with what it is sorted by; what is no number is sorted last."""
    if isinstance(value, str):
        return f'<td class="words" data-v="{escape(value)}">{escape(text)}</td>'
    known = "" if value is None or math.isnan(value) else repr(float(value))
    return f'<td data-v="{known}">{escape(text)}</td>'


def _domain(results: Results) -> tuple[float, float]:
    """The values that the small pictures of intervals span: all seeds, and a little more."""
    values = [value for row in results.rows for value in row.values if math.isfinite(value)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = (high - low or abs(high) or 1.0) * 0.12
    return low - room, high + room


def _bar(row: Row, domain: tuple[float, float], results: Results) -> str:
    """An interval as a line, its mean as a point, its seeds as rings: the cell before says the same in words."""
    width, height = BAR
    middle = height / 2

    def x(value: float) -> float:
        return round(4 + (width - 8) * min(1.0, max(0.0, (value - domain[0]) / (domain[1] - domain[0]))), 1)

    marks = []
    base = results.baseline_of(row)
    if base is not None and math.isfinite(base.mean):
        marks.append(f'<line class="ref" x1="{x(base.mean)}" x2="{x(base.mean)}" y1="0" y2="{height}"/>')
    if math.isfinite(row.interval.low) and math.isfinite(row.mean):
        marks.append(f'<line x1="{x(row.interval.low)}" x2="{x(row.interval.high)}" y1="{middle}" y2="{middle}"/>')
        if row.interval.low < domain[0]:
            marks.append(f'<path class="cut" d="M0 {middle}l7 -4v8z"/>')
        if row.interval.high > domain[1]:
            marks.append(f'<path class="cut" d="M{width} {middle}l-7 -4v8z"/>')
    marks += [
        f'<circle class="seed" cx="{x(v)}" cy="{middle}" r="2.5"/>'
        for v in row.values
        if math.isfinite(v) and len(row.values) > 1
    ]
    if math.isfinite(row.mean):
        marks.append(f'<circle cx="{x(row.mean)}" cy="{middle}" r="3.5"/>')
    return f'<svg width="{width}" height="{height}" aria-hidden="true">{"".join(marks)}</svg>'


def _differences(results: Results) -> str:
    rows, told = [], []
    for budget, found in results.differences.items():
        if not isinstance(found, str):
            told += [f"<li>{escape(text)}</li>" for text in sentences(found, results.metric, results.percent)]
            rows += [(difference(d, budget, results), (d.label, budget_text(budget))) for d in found]
    caption = "Label minus baseline, paired; p corrected by Holm’s method"
    numbers = _table("Differences", caption, compared(results), rows)
    stood = [
        (standing(each, budget, results), (each.label, budget_text(budget)))
        for budget, found in results.standings.items()
        for each in found
    ]
    among = _table("Every method among all", STOOD, STANDING, stood)
    return (
        f"<details open><summary>The numbers of this picture</summary>{numbers}</details>"
        + f"<details><summary>Every method among all: ranks, and what is to be expected</summary>{among}</details>"
        * bool(stood)
        + f"<details><summary>In words</summary><ul>{''.join(told)}</ul></details>"
    )


def _searches(results: Results) -> str:
    rows = [(searched(s, results), (s.label, budget_text(s.budget, s.free))) for s in results.searches]
    caption = "Learning rates and what they gave on the validation split"
    shown_table = _table("Learning rates", f"{caption}; {STOPPED}" if stopped(results) else caption, SEARCHED, rows)
    return f"<details><summary>The numbers of this picture</summary>{shown_table}</details>"


def _table(label: str, caption: str, heads: Sequence[str], rows: Sequence[tuple[Sequence[str], Of | None]]) -> str:
    """A table that is not sorted; a row with the label and budget that it is of is hidden with them."""

    def cell(head: str, text: str) -> str:
        kind = "words real" if head == "real" and text == "yes" else "words" if head in WORDS else ""
        inner = f"<code>{escape(text)}</code>" if head == "as it was run" else escape(text)
        return f"<td{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{inner}</td>"

    body = []
    for cells, of in rows:
        data = "" if of is None else f' data-of="{escape(json.dumps({"label": of[0], "budget": of[1]}))}"'
        rest = "".join(cell(head, text) for head, text in zip(heads[1:], cells[1:], strict=True))
        body.append(f'<tr{data}><th scope="row">{escape(cells[0])}</th>{rest}</tr>')
    top = "".join(f'<th scope="col"{" class=words" if head in WORDS else ""}>{escape(head)}</th>' for head in heads)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">'
        f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _problems(results: Results) -> str:
    parts = [
        f"<h3>{heading}</h3><ul>{''.join(f'<li><code>{escape(line)}</code></li>' for line in lines)}</ul>"
        for heading, lines in left_out(results)
    ]
    if not parts:
        return ""
    heading = '<h2 id="h-problems">Left out</h2>'
    return f'<section id="problems" aria-labelledby="h-problems">{heading}{"".join(parts)}</section>'


def _again(results: Results) -> str:
    parts = []
    if text := toml(results):
        parts.append(
            f"<p>This specification in a file, and <code>{escape(COMMAND)}</code>:</p>"
            '<div class="code"><button type="button" class="copy needs-script">Copy</button>'
            f'<pre tabindex="0" role="region" aria-label="Specification">{escape(text)}</pre></div>'
        )
    methods = [(as_run(record, results), None) for record in runs_of_methods(results)]
    heads = ("method", "as it was run", "learning rate")
    parts.append("<h3>Methods as they were run</h3>")
    parts.append(_table("Methods", "Hyper-parameters and learning rates", heads, methods))
    versions = [((name, "; ".join(texts)), None) for name, texts in provenance(results)]
    parts.append("<h3>Versions and machine</h3>")
    parts.append(_table("Versions", "Versions, revisions and machines of all runs", ("what", "version"), versions))
    return "".join(parts)
