"""The numbers as CSV."""

from __future__ import annotations

import csv
import io

from svdpeft.compare.records import finished
from svdpeft.compare.report.results import Results
from svdpeft.compare.store import Record

FIELDS = (
    "label",
    "budget",
    "seed",
    "lr",
    "metric",
    "value",
    "trainable",
    "factors",
    "sites",
    "attach_seconds",
    "attach_warm_seconds",
    "step_seconds",
    "throughput",
    "throughput_unit",
    "peak_memory_bytes",
    "checkpoint_bytes",
    "merge_error",
    "reload_error",
    "distance",
    "forgetting",
    "forgetting_before",
    "forgetting_after",
    "seconds",
    "method",
    "device",
    "date",
    "error",
    "undefined",
    "diverged",
)


def table_csv(results: Results) -> str:
    """Return one line per run, failed ones too."""
    text = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(text, FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _inert(cell) for key, cell in _flat(record).items()} for record in results.records)
    return text.getvalue()


def _inert(cell: object) -> object:
    """A text that a spreadsheet would run as a formula, behind the apostrophe that marks a text there."""
    if not isinstance(cell, str):
        return cell
    cell = cell.replace("\r", " ")  # which ends a line, and csv does not quote
    return f"'{cell}" if cell.lstrip().startswith(("=", "+", "-", "@")) else cell


def _flat(record: Record) -> Record:
    identity = record["identity"]
    flat = {**record, **{name: identity[name] for name in ("budget", "seed", "lr")}}
    flat |= {"method": identity["method"]["name"], "device": record["machine"]["device"]}
    if not finished(record):
        return flat
    forgetting = record["forgetting"] or {}
    return flat | {
        **record["parameters"],
        "metric": record["metric"]["name"],
        "value": record["metric"]["value"],
        "method": record["method"]["text"],
        "throughput": record["throughput"]["per_second"],
        "throughput_unit": record["throughput"]["unit"],
        "forgetting": forgetting.get("name"),
        "forgetting_before": forgetting.get("before"),
        "forgetting_after": forgetting.get("after"),
    }
