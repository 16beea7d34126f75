"""The table behind ``adapter.summary()``: repeated blocks in one row, totals, and a line for what was left."""

from __future__ import annotations

import io
import re
from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from svdpeft.adapter import Adapter


def summarise(adapter: Adapter) -> str:
    """Return the table as plain text."""
    table = Table(title=repr(adapter), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("site", "shape", "kind", "method", "path", "trainable"):
        table.add_column(column, justify="right" if column == "trainable" else "left", overflow="fold")
    groups: dict[tuple[str, ...], list[int]] = {}
    for name, site in adapter.sites.items():
        batch, m, n = site.shape
        shape = f"{m}x{n}" if batch == 1 else f"{batch}x({m}x{n})"
        path = "from factors alone" if site.skips else "dense" if site.dense else "factored"
        groups.setdefault((_blocks(name), shape, site.kind.name, str(site.method), path), []).append(site.count)
    for (name, *rest), counts in groups.items():
        times = f" ×{len(counts)}" if len(counts) > 1 else ""
        table.add_row(name + times, *rest, f"{sum(counts):,}")
    for name, (owner, attribute) in adapter.whole.items():
        tensor = getattr(owner, attribute)
        table.add_row(name, "x".join(map(str, tensor.shape)), "whole", "", "", f"{tensor.numel():,}")
    base = sum(p.numel() for n, p in adapter.model.named_parameters() if ".svdpeft." not in f".{n}")
    table.add_section()
    share = f"{adapter.trainable_count / base:.3%} of {base:,}"
    table.add_row("total", share, "", "", "", f"{adapter.trainable_count:,}", style="bold")
    lines = [_render(table)]
    left = Counter((_blocks(name), reason) for name, reason in adapter.skipped.items())
    if left:
        lines.append("not adapted:")
        lines += [f"  {name}{f' ×{count}' if count > 1 else ''}: {why}" for (name, why), count in left.items()]
    return "\n".join(lines)


def _blocks(name: str) -> str:
    """``blocks.3.attn`` -> ``blocks.*.attn``, so that repeated blocks share a row."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _render(table: Table) -> str:
    console = Console(file=io.StringIO(), width=140, color_system=None)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())
