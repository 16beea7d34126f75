"""From runs to a table, a CSV file and a picture."""

from __future__ import annotations

import csv
import io
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """All seeds of one method; times are medians, memory and bytes the largest."""

    label: str
    method: str
    metric: str
    values: tuple[float, ...]
    trainable: int
    factors: int
    attach_seconds: float
    step_seconds: float
    peak_memory_bytes: int
    checkpoint_bytes: int
    merge_error: float

    @property
    def mean(self) -> float:
        """Mean of the metric over seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Sample standard deviation over seeds; NaN for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else float("nan")


HEADINGS = (
    "method",
    "{metric} %",
    "trainable",
    "in factors",
    "attach s",
    "step ms",
    "peak MiB",
    "file KiB",
    "merge err",
)


def finished(record: Record) -> bool:
    """Whether a run has a result: it did not fail, and its method is defined on the model."""
    return "error" not in record and "undefined" not in record


def rows(records: Sequence[Record]) -> list[Row]:
    """Return one row per method, best first; runs that failed, or could not be, are left out."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if finished(record):
            groups.setdefault(record["label"], []).append(record)
    found = [
        Row(
            label=label,
            method=runs[0]["method"]["text"],
            metric=runs[0]["metric"]["name"],
            values=tuple(r["metric"]["value"] for r in runs),
            trainable=runs[0]["parameters"]["trainable"],
            factors=runs[0]["parameters"]["factors"],
            attach_seconds=statistics.median(r["attach_seconds"] for r in runs),
            step_seconds=statistics.median(r["step_seconds"] for r in runs),
            peak_memory_bytes=max(r["peak_memory_bytes"] for r in runs),
            checkpoint_bytes=max(r["checkpoint_bytes"] for r in runs),
            merge_error=max(r["merge_error"] for r in runs),
        )
        for label, runs in groups.items()
    ]
    return sorted(found, key=lambda row: -row.mean)


def _headings(found: Sequence[Row]) -> list[str]:
    return [heading.format(metric=found[0].metric if found else "metric") for heading in HEADINGS]


def _cells(row: Row) -> list[str]:
    spread = f" ± {100 * row.std:.1f}" if len(row.values) > 1 else ""
    return [
        row.label,
        f"{100 * row.mean:.1f}{spread}",
        f"{row.trainable:,}",
        f"{row.factors:,}",
        f"{row.attach_seconds:.2f}",
        f"{1000 * row.step_seconds:.0f}",
        f"{row.peak_memory_bytes / 2**20:,.0f}",
        f"{row.checkpoint_bytes / 2**10:,.0f}",
        f"{row.merge_error:.0e}",
    ]


def terminal(records: Sequence[Record]) -> Table:
    """Return the table for a terminal: 80 columns are enough."""
    found = rows(records)
    table = Table(
        title=title(records),
        caption="\n".join(_without(records, "error") + _without(records, "undefined")) or None,
        box=None,
        padding=(0, 1, 0, 0),
    )
    table.title_justify = table.caption_justify = "left"
    cells = [_cells(row) for row in found]
    for i, heading in enumerate(_headings(found)):
        if heading != "in factors":  # the report has it
            width = max((len(row[i]) for row in cells), default=0) if i else None  # a long label folds
            table.add_column(heading, justify="right" if i else "left", min_width=width, overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for heading, cell in zip(HEADINGS, row, strict=True) if heading != "in factors"))
    return table


def markdown(records: Sequence[Record]) -> str:
    """Return the report: what was run, the table, the methods in full, failures, versions."""
    found = rows(records)
    lines = [f"# {title(records)}", "", "| " + " | ".join(_headings(found)) + " |"]
    lines.append("| --- |" + " ---: |" * (len(HEADINGS) - 1))
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in found]
    lines += ["", "![metric against trainable parameters](report.png)", ""]
    lines += [
        "The metric is the mean over seeds ± its sample standard deviation. `trainable` counts the new head too, "
        "`in factors` does not; a budget is for the factors. Times are medians "
        "over steps and seeds on the machine named below; memory is the largest resident set of the whole process "
        "(on a GPU: allocated memory); merge error is max|y_merged − y| / max|y|.",
        "",
        "## As it was run",
        "",
    ]
    for label, record in {r["label"]: r for r in records}.items():
        text = record["method"]["text"] if finished(record) else record.get("error") or record["undefined"]
        lines.append(f"- {label}: `{text}`, learning rate {record['identity']['lr']:g}")
    identity = {k: v for k, v in records[0]["identity"].items() if k not in ("method", "seed", "lr")}
    lines += ["", "```python", *(f"{key} = {value!r}" for key, value in identity.items()), "```", ""]
    lines += [f"svdpeft {records[0]['svdpeft']}, git {records[0]['git']}, {records[0]['date']}", ""]
    lines += [", ".join(f"{k} {v}" for k, v in (records[0]["versions"] | records[0]["machine"]).items())]
    for heading, what in (("Failed", "error"), ("Not defined on this model", "undefined")):
        if found := _without(records, what):
            lines += ["", f"## {heading}", "", *(f"- {line}" for line in found)]
    return "\n".join(lines) + "\n"


def title(records: Sequence[Record]) -> str:
    """Return what was compared on what: "efficientnet-lite0 on mnist5k, budget 1.5%, 3 seeds"."""
    identity = records[0]["identity"]
    seeds = len({record["identity"]["seed"] for record in records})
    budget = f", budget {identity['budget']}" if identity["budget"] else ""
    return f"{identity['model']} on {identity['task']['name']}{budget}, {seeds} seed{'s' if seeds > 1 else ''}"


def table_csv(records: Sequence[Record]) -> str:
    """Return one line per run, failed ones too."""
    fields = (
        "label",
        "seed",
        "metric",
        "value",
        "trainable",
        "factors",
        "lr",
        "attach_seconds",
        "step_seconds",
    )
    fields += ("peak_memory_bytes", "checkpoint_bytes", "merge_error", "method", "error", "undefined")
    text = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(text, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for r in records:
        flat = {
            **r,
            "seed": r["identity"]["seed"],
            "lr": r["identity"]["lr"],
            "method": r["identity"]["method"]["name"],
        }
        if finished(r):
            flat |= {
                "metric": r["metric"]["name"],
                "value": r["metric"]["value"],
                "method": r["method"]["text"],
            }
            flat |= r["parameters"]
        writer.writerow(flat)
    return text.getvalue()


def picture(records: Sequence[Record], path: Path) -> None:
    """Draw the metric against trainable parameters: a point per method, its line from the worst seed to the best."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    found = rows(records)
    many = len(found) > 20
    figure = Figure(figsize=(11, 7) if many else (8, 5), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(found):
        low, high = row.mean - min(row.values), max(row.values) - row.mean
        axes.errorbar(
            row.trainable,
            100 * row.mean,
            yerr=[[100 * low], [100 * high]],
            fmt="osD^vP*Xh"[i % 9],
            color=f"C{i % 10}",
            markersize=7,
            capsize=3,
            label=f"{row.label}  {100 * row.mean:.1f} %",
        )
    axes.set(xscale="log", xlabel="trainable parameters, head included", title=title(records))
    axes.set_ylabel(f"{found[0].metric} in %; line: worst to best seed")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", frameon=False, ncols=2 if many else 1, fontsize=8 if many else None)
    figure.savefig(path, dpi=150)


def write(records: Sequence[Record], folder: Path) -> None:
    """Write ``report.md``, ``results.csv`` and, if any run ended well, ``report.png`` into ``folder``."""
    for name, text in (("report.md", markdown(records)), ("results.csv", table_csv(records))):
        temporary = folder / f".{name}.{os.getpid()}"
        temporary.write_text(text)
        os.replace(temporary, folder / name)
    if rows(records):
        temporary = folder / f".report.{os.getpid()}.png"
        picture(records, temporary)
        os.replace(temporary, folder / "report.png")


def _without(records: Sequence[Record], what: str) -> list[str]:
    """The runs without a result, for one of the two reasons."""
    return [f"{r['label']}, seed {r['identity']['seed']}: {r[what]}" for r in records if what in r]
