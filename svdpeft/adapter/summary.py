"""The table behind ``adapter.summary()``: repeated blocks in one row, totals, and a line for what was left."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from svdpeft.layers.quantising import values_in
from svdpeft.methods.base import Method
from svdpeft.sites.place import is_factor
from svdpeft.sites.site import Site
from svdpeft.sites.weights import stored
from svdpeft.targets.inventory import weights_of


def summarise(
    title: str,
    model: nn.Module,
    sites: Mapping[str, Site],
    whole: Mapping[str, tuple[nn.Module, str]],
    skipped: Mapping[str, str],
    lowered: Sequence[str] = (),
    note: str = "",
) -> str:
    """Return the table as plain text.

    Args:
        title: its first line.
        model: with the adapter attached.
        sites: of the adapter.
        whole: what of the base it trains whole.
        skipped: weight -> why it was left.
        lowered: sites whose rank was too large for their matrix.
        note: a line about the file.
    """
    table = Table(box=None, pad_edge=False)
    for column in ("site", "shape", "kind", "method", "path", "trainable"):
        table.add_column(column, justify="right" if column == "trainable" else "left", overflow="fold")
    total = sum(site.count for site in sites.values())
    groups: dict[tuple[str, ...], list[int]] = {}
    for name, site in sites.items():
        batch, m, n = site.shape
        shape = f"{m}x{n}" if batch == 1 else f"{batch}x({m}x{n})"
        key = (_blocks(name), shape, site.kind.name, str(site.method), site.path)
        groups.setdefault(key, []).append(site.count)
    for (name, *rest), counts in groups.items():
        times = f" ×{len(counts)}" if len(counts) > 1 else ""
        table.add_row(*map(Text, (name + times, *rest, f"{sum(counts):,}")))  # no markup: names may end in [q]
    for role, parameter, users in _shared(sites):
        where = f"{role} of {len(users)} site" + "s" * (len(users) > 1)
        size, method = "x".join(map(str, parameter.shape)), str(sites[users[0]].method)
        total += parameter.numel()
        table.add_row(*map(Text, (where, size, "shared", method, "", f"{parameter.numel():,}")))
    for name, (owner, attribute) in whole.items():
        tensor = stored(owner, attribute)
        total += tensor.numel()
        table.add_row(Text(name), "x".join(map(str, tensor.shape)), "whole", "", "", f"{tensor.numel():,}")
    base = values_in(model) - sum(p.numel() for n, p in model.named_parameters() if is_factor(n))
    table.add_section()
    table.add_row("total", f"{total / base:.3%} of {base:,}", "", "", "", f"{total:,}", style="bold")
    lines = [title, _render(table)]
    if lowered:
        names = Counter(map(_blocks, lowered))
        shown = ", ".join(f"{name}{f' ×{count}' if count > 1 else ''}" for name, count in names.items())
        lines.append(f"rank lowered to what the matrix has: {shown}")
    if note:
        lines.append(note)
    left = Counter((_blocks(name), reason) for name, reason in skipped.items())
    vectors = _vectors(model, whole)
    if left or vectors:
        lines.append("not adapted:")
        lines += [f"  {name}{f' ×{count}' if count > 1 else ''}: {why}" for (name, why), count in left.items()]
    if vectors:
        lines.append(
            f"  {len(vectors)} vectors (biases, norms and the like, {sum(vectors):,} values): train= names what trains"
        )
    return "\n".join(lines)


def lowered(methods: Sequence[Method], sites: Mapping[str, Site]) -> list[str]:
    """The sites whose rank is below what a method of the adapter asks for: it did not fit."""
    found = []
    for name, site in sites.items():
        rank, kind = getattr(site.method, "rank", None), type(site.method)
        asked = (getattr(method, "rank", None) for method in methods if type(method) is kind)
        if isinstance(rank, int) and rank == min(site.shape[1:]):
            found += [name] if any(isinstance(a, int) and a > rank for a in asked) else []
    return found


def _shared(sites: Mapping[str, Site]) -> list[tuple[str, Tensor, list[str]]]:
    """What several sites train together: name, parameter, sites."""
    found: dict[int, tuple[str, Tensor, list[str]]] = {}
    for name, site in sites.items():
        for role in site.factors.tied:
            parameter = getattr(site.factors, role)
            if parameter.requires_grad:
                found.setdefault(id(parameter), (role, parameter, []))[2].append(name)
    return list(found.values())


def _vectors(model: nn.Module, whole: Mapping[str, Any]) -> list[int]:
    """Sizes of the parameters of the base that are no matrices and do not train."""
    known = {id(weight.tensor) for weight in weights_of(model)}
    base = ((name, p) for name, p in model.named_parameters() if not is_factor(name))
    return [p.numel() for name, p in base if id(p) not in known and name not in whole]


def _blocks(name: str) -> str:
    """``blocks.3.attn`` -> ``blocks.*.attn``, so that repeated blocks share a row."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _render(table: Table) -> str:
    console = Console(file=io.StringIO(), width=140, color_system=None)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())
