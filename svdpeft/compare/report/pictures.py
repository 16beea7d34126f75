"""The pictures beside ``report.md``. The page draws its own."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import Any

from svdpeft.compare.report.columns import metric_heading
from svdpeft.compare.report.payload import mean_curve
from svdpeft.compare.report.results import Results, Row

COLOURS = ("#2751b8", "#c2410c", "#08734f", "#d0569b", "#6a5a10", "#4b1183", "#707bee", "#6f0d15")
MANY = 20  # lines of a legend in one column


def picture(results: Results) -> bytes:
    """Draw the metric against trainable parameters, with intervals over seeds and the Pareto front; a PNG."""
    figure, axes = _figure(results)
    scale = 100 if results.percent else 1
    for i, row in enumerate(results.rows):
        half = (row.interval.high - row.interval.low) / 2
        axes.errorbar(
            row.trainable,
            scale * row.mean,
            yerr=None if math.isnan(half) else scale * half,
            fmt="osD^vP*Xh"[i % 9],
            color=COLOURS[i % len(COLOURS)],
            markersize=7,
            capsize=3,
            label=f"{results.name(row.label, row.budget)}  {scale * row.mean:.{1 if scale > 1 else 3}f}",
        )
    front = pareto(results)
    axes.plot([r.trainable for r in front], [scale * r.mean for r in front], drawstyle="steps-post", color="0.6", zorder=0)
    axes.set(xscale="log", xlabel="trainable parameters, head included")
    interval = f"; line: {100 * results.confidence:g} % interval over seeds" if len(results.rows[0].values) > 1 else ""
    axes.set_ylabel(f"{metric_heading(results)}{interval}", parse_math=False)
    return _finish(figure, axes, results)


def curves(results: Results) -> bytes:
    """Draw the loss in training: the mean over seeds of every method, smoothed; a PNG."""
    figure, axes = _figure(results)
    for i, row in enumerate(results.rows):
        steps, losses = smooth(mean_curve(row.runs))
        axes.plot(
            steps,
            losses,
            color=COLOURS[i % len(COLOURS)],
            linestyle=("-", "--", ":", "-.")[i // len(COLOURS) % 4],
            linewidth=1.4,
            label=results.name(row.label, row.budget),
        )
    axes.set(xlabel="optimizer step", ylabel="training loss, running mean over seeds and 5 % of the steps")
    return _finish(figure, axes, results)


def pareto(results: Results) -> list[Row]:
    """Return the rows that no other beats with as few trainable parameters, from the fewest."""
    sign = 1 if results.higher else -1
    front: list[Row] = []
    for row in sorted(results.rows, key=lambda row: (row.trainable, -sign * row.mean)):
        if not math.isnan(row.mean) and (not front or sign * row.mean > sign * front[-1].mean):
            front.append(row)
    return front


def smooth(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return steps and the running mean of the losses over a twentieth of the points."""
    listed = list(points)
    half = max(1, len(listed) // 40)
    losses = [loss for _, loss in listed]
    means = []
    for i in range(len(losses)):
        window = losses[max(0, i - half) : i + half + 1]
        means.append(sum(window) / len(window))
    return [step for step, _ in listed], means


def _figure(results: Results) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(11, 7) if len(results.rows) > MANY else (8, 5), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3, which="both")
    return figure, axes


def _finish(figure: Any, axes: Any, results: Results) -> bytes:
    axes.set_title(results.title, parse_math=False)
    many = len(results.rows) > MANY
    legend = figure.legend(
        loc="outside right upper", frameon=False, ncols=2 if many else 1, fontsize=8 if many else None
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    data = io.BytesIO()
    figure.savefig(data, dpi=150, metadata={"Software": None})
    return data.getvalue()
