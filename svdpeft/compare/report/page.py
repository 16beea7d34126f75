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

from svdpeft.compare.report.columns import columns, metric_heading, metric_text, spread_text
from svdpeft.compare.report.limits import limits, provenance, shown
from svdpeft.compare.report.payload import payload
from svdpeft.compare.report.results import Results, Row
from svdpeft.compare.report.specification import bibtex, toml
from svdpeft.compare.report.text import COMMAND, needed, runs_of_methods
from svdpeft.compare.statistics import sentences

SCRIPTS = ("vendor/d3.min.js", "vendor/plot.umd.min.js", "charts.js", "app.js")
BAR = (130, 20)  # pixels of the picture of an interval


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
        ("problems", "Left out", bool(_left_out(results))),
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
    found, several = columns(results), len(results.budgets) > 1
    heads = [
        _head("method", "words"),
        *([_head("budget", "words")] if several else []),
        _head(metric_heading(results), sort="descending" if results.higher else "ascending"),
        f'<th scope="col">{100 * results.confidence:g} % interval</th>',
        _head("deviation"),
        _head("seeds"),
        *(_head(column.heading) for column in found),
    ]
    domain = _domain(results)
    body = []
    for i, row in enumerate(results.rows):
        cells = [
            *([_cell(str(row.budget or "none"))] if several else []),
            _cell(spread_text(row, results), row.mean),
            f'<td class="bar">{_bar(row, domain, results)}</td>',
            _cell(metric_text(row.std, results), row.std),
            _cell(str(len(row.values)), len(row.values)),
            *(_cell(column.text(row), column.value(row)) for column in found),
        ]
        base = ' class="base"' if row.label == results.baseline else ""
        head = f'<th scope="row" data-v="{escape(row.label)}">{escape(row.label)}</th>'
        body.append(f'<tr data-row="{i}"{base}>{head}{"".join(cells)}</tr>')
    meaning = {
        metric_heading(results): f"mean over seeds ± half of its {100 * results.confidence:g} % interval (Student’s t)",
        "deviation": "sample standard deviation over seeds",
        **{column.heading: column.meaning for column in found},
    }
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in meaning.items())
    return (
        '<div class="scroll" role="region" tabindex="0" aria-label="Table of results">'
        '<table class="sortable"><caption>Best first. Press a heading to sort.</caption>'
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        f'<details><summary>What the columns mean</summary><dl class="meaning">{entries}</dl></details>'
    )


def _head(text: str, kind: str = "number", sort: str = "none") -> str:
    return f'<th scope="col" aria-sort="{sort}" data-kind="{kind}"><button type="button">{escape(text)}</button></th>'


def _cell(text: str, value: float | None = math.inf) -> str:
    """A cell; ``value`` is what it is sorted by, the text where none is given."""
    if value == math.inf:
        return f'<td class="words" data-v="{escape(text)}">{escape(text)}</td>'
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
    base = next((r for r in results.rows if (r.label, r.budget) == (results.baseline, row.budget)), None)
    if base is not None and math.isfinite(base.mean):
        marks.append(f'<line class="ref" x1="{x(base.mean)}" x2="{x(base.mean)}" y1="0" y2="{height}"/>')
    if math.isfinite(row.interval.low) and math.isfinite(row.mean):
        marks.append(f'<line x1="{x(row.interval.low)}" x2="{x(row.interval.high)}" y1="{middle}" y2="{middle}"/>')
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
    unit = "points" if results.percent else results.metric
    for budget, found in results.differences.items():
        if isinstance(found, str):
            continue
        told += [f"<li>{escape(text)}</li>" for text in sentences(found, results.metric)]
        for d in found:
            of = escape(json.dumps({"label": d.label, "budget": "" if budget is None else str(budget)}))
            real = '<td class="words real">yes</td>' if d.real else '<td class="words">no</td>'
            rows.append(
                f"<tr data-of=\"{of}\"><th scope='row'>{escape(results.name(d.label, budget))}</th>"
                f"<td>{metric_text(d.mean, results)}</td>"
                f"<td>{metric_text(d.low, results)} to {metric_text(d.high, results)}</td>"
                + "".join(f"<td>{'–' if math.isnan(p) else f'{p:.2g}'}</td>" for p in (d.p, d.p_corrected))
                + f"{real}<td>{d.seeds}</td><td>{needed(d.seeds_needed, d.items_needed)}</td>"
                + f'<td class="words">{escape(d.note)}</td></tr>'
            )
    heads = ("method", unit, "interval", "p", "p corrected", "real", "seeds", "seeds that would settle it", "note")
    return (
        "<details open><summary>The numbers of this picture</summary>"
        + _table(
            "Differences", "Label minus baseline, paired; p corrected by Holm’s method", heads, rows, ("real", "note")
        )
        + f"</details><details><summary>In words</summary><ul>{''.join(told)}</ul></details>"
    )


def _searches(results: Results) -> str:
    rows = []
    for s in results.searches:
        of = escape(json.dumps({"label": s.label, "budget": "" if s.budget is None else str(s.budget)}))
        tried = ", ".join(f"{rate:.3g}: {'failed' if v is None else f'{v:.4g}'}" for rate, _, v in s.points)
        chosen = "–" if s.chosen is None else f"{s.chosen:.3g}"
        edge = f"{s.edge} of its grid: a better one may lie outside" if s.edge else ""
        rows.append(
            f'<tr data-of="{of}"><th scope="row">{escape(results.name(s.label, s.budget))}</th><td>{chosen}</td>'
            f'<td class="words">{escape(edge)}</td><td class="words">{escape(tried)}</td></tr>'
        )
    table = _table(
        "Learning rates",
        "Learning rates and what they gave on the validation split",
        ("method", "chosen", "at an edge", "tried"),
        rows,
        ("at an edge", "tried"),
    )
    return f"<details><summary>The numbers of this picture</summary>{table}</details>"


def _table(label: str, caption: str, heads: Sequence[str], rows: Sequence[str], words: Sequence[str] = ()) -> str:
    """A table that is not sorted; ``words`` are the headings of columns of words, which begin at the left."""
    cells = "".join(f'<th scope="col"{" class=words" if head in words else ""}>{escape(head)}</th>' for head in heads)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">'
        f"<table><caption>{escape(caption)}</caption><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _left_out(results: Results) -> list[tuple[str, list[str]]]:
    found = [
        ("Failed", results.without("error")),
        ("Not defined on this model", results.without("undefined")),
        ("Damaged files", [f"{file.path}: {file.reason}" for file in results.damaged]),
    ]
    return [(heading, lines) for heading, lines in found if lines]


def _problems(results: Results) -> str:
    parts = [
        f"<h3>{heading}</h3><ul>{''.join(f'<li><code>{escape(line)}</code></li>' for line in lines)}</ul>"
        for heading, lines in _left_out(results)
    ]
    if not parts:
        return ""
    heading = '<h2 id="h-problems">Left out</h2>'
    return f'<section id="problems" aria-labelledby="h-problems">{heading}{"".join(parts)}</section>'


def _again(results: Results) -> str:
    methods = [
        f"<tr><th scope='row'>{escape(results.name(r['label'], r['identity']['budget']))}</th>"
        f'<td class="words"><code>{escape(r["method"]["text"] if "method" in r else "–")}</code></td>'
        f"<td>{r['identity']['lr']:g}</td></tr>"
        for r in runs_of_methods(results)
    ]
    versions = [
        f'<tr><th scope="row">{escape(name)}</th><td class="words">{escape("; ".join(texts))}</td></tr>'
        for name, texts in provenance(results)
    ]
    parts = []
    if text := toml(results):
        parts.append(
            f"<p>This specification in a file, and <code>{escape(COMMAND)}</code>:</p>"
            '<div class="code"><button type="button" class="copy needs-script">Copy</button>'
            f'<pre tabindex="0" role="region" aria-label="Specification">{escape(text)}</pre></div>'
        )
    parts.append("<h3>Methods as they were run</h3>")
    parts.append(
        _table(
            "Methods",
            "Hyper-parameters and learning rates",
            ("method", "as it was run", "learning rate"),
            methods,
            ("as it was run",),
        )
    )
    parts.append("<h3>Versions and machine</h3>")
    parts.append(
        _table("Versions", "Versions, revisions and machines of all runs", ("what", "version"), versions, ("version",))
    )
    return "".join(parts)
