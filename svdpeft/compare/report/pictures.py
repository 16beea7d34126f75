"""The pictures beside ``report.md``. The page draws its own."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from svdpeft.compare.report.columns import metric_heading
from svdpeft.compare.report.limits import pareto
from svdpeft.compare.report.payload import mean_curve
from svdpeft.compare.report.results import Results
from svdpeft.compare.statistics import interval

INK = {False: ("white", "black", "0.62", "#1f4fd8", "#c2410c"), True: ("#14161a", "0.92", "0.5", "#8ab4ff", "#ffb07a")}
COLOURS = ("#4c81fa", "#c57118", "#b41c62", "#2b1a9a", "#495704", "#7941c0", "#a774ab", "#630e55")
MANY = 20  # lines of a legend in one column


def picture(results: Results) -> bytes:
    """Draw the metric against trainable parameters, with intervals over seeds and the Pareto front; a PNG."""
    figure, axes = _figure(results)
    scale = 100 if results.percent else 1
    for i, row in enumerate(results.rows):
        low, high = row.ends
        axes.errorbar(
            row.trainable,
            scale * row.mean,
            yerr=None if math.isnan(high - low) else [[scale * (row.mean - low)], [scale * (high - row.mean)]],
            fmt="osD^vP*Xh"[i % 9],
            color=COLOURS[i % len(COLOURS)],
            markersize=7,
            capsize=3,
            label=f"{results.name(row.label, row.budget)}  {scale * row.mean:.{1 if scale > 1 else 3}f}",
        )
    front = pareto(results)
    corners = [row.trainable for row in front], [scale * row.mean for row in front]
    axes.plot(*corners, drawstyle="steps-post", color="0.6", zorder=0)
    axes.set(xscale="log", xlabel="trainable parameters, head included")
    seeds = len(results.rows[0].values)
    line = f"{100 * results.confidence:g} % interval over seeds" if seeds > 2 else "from one seed to the other"
    interval = f"; line: {line}" if seeds > 1 else ""
    axes.set_ylabel(f"{metric_heading(results)}{interval}", parse_math=False)
    return _finish(figure, axes, results)


def curves(results: Results) -> bytes:
    """Draw the training loss, the mean over seeds of every method, smoothed; of many the best have a colour; a PNG."""
    figure, axes = _figure(results)
    named = len(results.rows) if len(results.rows) <= MANY else len(COLOURS)
    for i, row in reversed(list(enumerate(results.rows))):  # the best above the others
        steps, losses = smooth(mean_curve(row.runs))
        style = {"color": "0.75", "linewidth": 0.8, "label": "the others" if i == named else None}
        if i < named:
            dash = ("-", "--", ":", "-.")[i // len(COLOURS)]
            style = {"color": COLOURS[i % len(COLOURS)], "linewidth": 1.5, "linestyle": dash}
            style["label"] = results.name(row.label, row.budget)
        axes.plot(steps, losses, **style)
    axes.set(xlabel="optimizer step", ylabel="training loss with penalties\nrunning mean of seeds and 5 % of the steps")
    return _finish(figure, axes, results, reverse=True)


def side_by_side(comparisons: Sequence[Results], dark: bool = False) -> bytes:
    """Draw several comparisons, a column each: above the metric, below what the base forgot; a PNG.

    Both against the trainable parameters on a log axis, with intervals over seeds. The Pareto front of the metric is a
    line; its methods and the baseline have marks of their own, above and below, and the others are dots.

    Args:
        comparisons: one or more, with a result each.
        dark: light on dark, for a screen; otherwise for print.
    """
    import matplotlib
    from matplotlib.figure import Figure

    paper, ink, rest, ours, theirs = INK[dark]
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context({**dict.fromkeys(names, ink), "axes.facecolor": paper}):
        figure = Figure(figsize=(1 + 4.2 * len(comparisons), 8.5), layout="constrained", facecolor=paper)
        grid = figure.subplots(2, len(comparisons), squeeze=False, sharex="col")
        for column, results in enumerate(comparisons):
            above, below = grid[:, column]
            scale, front = 100 if results.percent else 1, pareto(results)
            marks = {id(row): mark for row, mark in zip(front, "sD^vP*Xh<>" * len(front), strict=False)}
            named = [*front, *(row for row in results.rows if row.label == results.baseline and row not in front)]
            for row in [*(row for row in results.rows if row not in named), *named]:  # the named ones on top
                base = row.label == results.baseline
                style: dict[str, Any] = {"fmt": ".", "color": rest, "linewidth": 0.6, "markersize": 5}
                if row in named:
                    mark = marks.get(id(row), "o")
                    style = {"fmt": mark, "color": theirs if base else ours, "linewidth": 1.4, "markersize": 7}
                    style |= {"label": results.name(row.label, row.budget) + " (baseline)" * base}
                lost = interval(row.forgotten, results.confidence) if row.forgotten else None
                drawn = [(above, scale * row.mean, *(scale * end for end in row.ends))]
                drawn += [(below, lost.mean, lost.low, lost.high)] if lost else []
                for axes, mean, low, high in drawn:
                    bars = None if math.isnan(high - low) else [[mean - low], [high - mean]]
                    axes.errorbar(row.trainable, mean, yerr=bars, **style)
            corners = [row.trainable for row in front], [scale * row.mean for row in front]
            above.plot(*corners, drawstyle="steps-post", color=ours, linewidth=1, zorder=1)
            if results.percent:
                low, high = above.get_ylim()
                above.set_ylim(max(0, low), min(100, high))  # an interval may reach beyond what an accuracy can be
            steps = max(len(run["loss"]) for row in results.rows for run in row.runs)
            above.set_title(f"{results.title}, {steps} steps".replace(", ", "\n", 1), fontsize=10, parse_math=False)
            above.set_ylabel(metric_heading(results), parse_math=False)
            below.set(xscale="log", xlabel="trainable parameters, head included")
            measured = {f["name"] for row in results.rows for run in row.runs if (f := run["forgetting"])}
            below.set_ylabel(f"forgotten: {', '.join(sorted(measured)) or 'not measured'}", parse_math=False)
            for axes in (above, below):
                axes.grid(alpha=0.2, color=rest)
                axes.spines[["top", "right"]].set_visible(False)
            legend = below.legend(
                *above.get_legend_handles_labels(),
                loc="upper center",
                bbox_to_anchor=(0.5, -0.14),
                ncols=3,
                frameon=False,
                fontsize=8,
            )
            for text in legend.get_texts():
                text.set_parse_math(False)
        data = io.BytesIO()
        figure.savefig(data, dpi=150, metadata={"Software": None}, facecolor=paper)
    return data.getvalue()


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


def _finish(figure: Any, axes: Any, results: Results, reverse: bool = False) -> bytes:
    axes.set_title(results.title, parse_math=False)
    many = len(results.rows) > MANY
    legend = figure.legend(
        loc="outside right upper",
        frameon=False,
        ncols=2 if many and not reverse else 1,
        fontsize=8 if many else None,
        reverse=reverse,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    data = io.BytesIO()
    figure.savefig(data, dpi=150, metadata={"Software": None})
    return data.getvalue()
