"""The generated page: a row a model, as markdown."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version

import torch

from benchmarks.coverage.check import BOUND, RANK, Row


def counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common())


def listed(names: Counter[str], limit: int = 6) -> str:
    parts = [f"`{name}`" + (f" ×{count}" if count > 1 else "") for name, count in names.items()]
    rest = sum(list(names.values())[limit:])
    return ", ".join(parts[:limit]) + (f" and {rest} more" if rest else "")


def page(library: str, rows: list[Row]) -> str:
    """The generated page as markdown."""
    good = [row for row in rows if not row.error]
    kinds, paths = (sum((getattr(row, which) for row in good), Counter()) for which in ("kinds", "paths"))
    inside, total = sum(row.inside for row in good), sum(row.total for row in good)
    lines = [
        f"# Coverage: {library}",
        "",
        f"Made by `python -m benchmarks.coverage {library}` with {library} {version(library)} and torch "
        f"{torch.__version__.split('+')[0]}, on random weights, in float64; do not edit it.",
        "",
        f'Every model got `attach(model, LoRA(rank={RANK}), targets="all", clip_rank=True)`. Checked on each:',
        "",
        "- attached, its output is the base model's, bit for bit;",
        "- every parameter with two axes or more is either adapted or named with the reason why it is not, but for "
        "vectors with axes to broadcast along, such as class tokens;",
        "- with all factors moved off their start, the output is another, and every adapted weight has a part in it: "
        "the gradient of its factors is not zero;",
        f"- merged, the output is the adapted one within {BOUND:.0e} of its size; unmerged, bit for bit;",
        "- detached, every parameter, buffer, `state_dict` key and the output are the base model's, bit for bit.",
        "",
        f"**{len({row.family for row in rows})} families, {len(rows)} models, {len(rows) - len(good)} failed.** "
        f"{sum(row.adapted for row in good):,} weights are adapted, with {inside / max(total, 1):.1%} of the values "
        f"in all weights. By kind: {counted(kinds)}. By path: {counted(paths)}.",
        "",
        "In the table, `share` is that share of one model, and `*` stands for the numbers of repeated blocks.",
        "",
        f"| family | {'model @ input' if library == 'timm' else 'sort'} | weights | share | by kind | by path | left |",
        "| --- | --- | ---: | ---: | --- | --- | --- |",
    ]
    for row in rows:
        left = "; ".join(f"{why}: {listed(names)}" for why, names in row.left.items())
        cells = [str(row.adapted), f"{row.inside / row.total:.1%}" if row.total else "", counted(row.kinds)]
        if row.error:
            left = f"**failed**: {row.error}"
        lines.append(" | ".join([f"| {row.family}", row.label, *cells, counted(row.paths), f"{left} |"]))
    return "\n".join(lines) + "\n"
