"""The columns of the table: one place for the terminal, the Markdown, the page and the axes of its pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from svdpeft.compare.report.results import Results, Row


@dataclass(frozen=True)
class Column:
    """One thing that was measured besides the metric.

    Args:
        key: name in the page's data.
        heading: at most ten characters or so.
        meaning: what is measured, for somebody who reads the table for the first time.
        value: of a row, in the unit of the heading; ``None`` where it was not measured.
        form: format specification.
        axis: whether the metric can be drawn against it.
    """

    key: str
    heading: str
    meaning: str
    value: Callable[[Row], float | None]
    form: str
    axis: bool = True

    def text(self, row: Row) -> str:
        value = self.value(row)
        return "–" if value is None or math.isnan(value) else format(value, self.form)


def columns(results: Results) -> list[Column]:
    """Return the columns after the metric; those that no row has are left out."""
    forgotten = next((f["name"] for row in results.rows for run in row.runs if (f := run["forgetting"])), "")
    others = dict.fromkeys(name for row in results.rows for run in row.runs for name in run["items"])
    others.pop(results.metric, None)
    every = [
        *(_other(name) for name in others),
        Column("trainable", "trainable", "values that train, new head included", lambda r: r.trainable, ",d"),
        Column("factors", "in factors", "values that train in factors, held to the budget", lambda r: r.factors, ",d"),
        Column("attach", "attach s", "seconds to attach the method (median)", _times("attach_seconds"), ".2f"),
        Column("warm", "warm s", "the same with the SVD cache filled", _times("attach_warm_seconds"), ".2f"),
        Column("step", "step ms", "milliseconds per optimizer step (median)", _times("step_seconds", 1e3), ",.0f"),
        Column("speed", f"{results.unit}/s", f"{results.unit} per second in training", lambda r: r.throughput, ",.1f"),
        Column(
            "memory",
            "peak MiB",
            "most memory above what the process held before the model was loaded (CPU: resident; GPU: allocated)",
            lambda r: _scaled(r.largest("peak_memory_bytes"), 2**-20),
            ",.0f",
        ),
        Column(
            "file",
            "file KiB",
            "size of the saved adapter",
            lambda r: _scaled(r.largest("checkpoint_bytes"), 2**-10),
            ",.0f",
        ),
        Column("merge", "merge err", "max|y_merged − y| / max|y|", lambda r: r.largest("merge_error"), ".0e", False),
        Column(
            "reload",
            "reload err",
            "the same for the adapter saved and loaded into a fresh base",
            lambda r: r.largest("reload_error"),
            ".0e",
            False,
        ),
        Column(
            "distance",
            "distance",
            "‖W′ − W‖ / ‖W‖ over all parameters of the base (not the new head; running statistics are not parameters)",
            lambda r: r.median("distance"),
            ".3g",
        ),
        Column(
            "forgetting",
            "forgetting",
            f"{forgotten or 'metric'} on data from before, after − before: more is more forgotten",
            lambda r: r.forgetting,
            ".3g",
        ),
    ]
    return [column for column in every if any(column.value(row) is not None for row in results.rows)]


def _other(metric: str) -> Column:
    """Another metric of the test split than the one that ranks."""
    heading = f"test {metric}" if metric.endswith("loss") else metric
    meaning = "on the test split, mean over seeds"
    return Column(f"other_{metric}", heading, meaning, lambda row: row.mean_of(metric), ".3f", axis=False)


def metric_text(value: float, results: Results) -> str:
    """A value of the metric, or a difference of two, without its unit: per cent have one digit, losses three.

    Example:
        >>> metric_text(0.9312, Results([])), metric_text(float("nan"), Results([]))
        ('93.1', '–')
    """
    if math.isnan(value):
        return "–"
    text = f"{100 * value:.1f}" if results.percent else f"{value:.3f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def spread_text(row: Row, results: Results) -> str:
    """Mean ± half the width of the interval; of two seeds the mean and both values; of one the mean alone."""
    low, high = row.ends
    mean = metric_text(row.mean, results)
    if math.isnan(high - low):
        return mean
    if len(row.values) == 2:
        return f"{mean} ({metric_text(low, results)}, {metric_text(high, results)})"
    return f"{mean} ± {metric_text((high - low) / 2, results)}"


def spread_meaning(results: Results) -> str:
    """What ``spread_text`` writes, in words."""
    meaning = f"mean over seeds ± half of its {100 * results.confidence:g} % interval (Student's t)"
    two = "; of two seeds the mean, and both values in brackets"
    return meaning + two * any(len(row.values) == 2 for row in results.rows)


def metric_heading(results: Results) -> str:
    return f"{results.metric} %" if results.percent else results.metric


def _times(key: str, scale: float = 1.0) -> Callable[[Row], float | None]:
    return lambda row: _scaled(row.median(key), scale)


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale
