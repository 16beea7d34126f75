"""The table behind ``adapter.summary()``: repeated blocks in one row, totals, and a line for what was left."""

from __future__ import annotations

import io
import re
from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from svdpeft.inventory import weights_of
from svdpeft.weights import stored

if TYPE_CHECKING:
    from svdpeft.adapter import Adapter


def summarise(adapter: Adapter) -> str:
    """Return the table as plain text."""
    table = Table(box=None, pad_edge=False)
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
        table.add_row(*map(Text, (name + times, *rest, f"{sum(counts):,}")))  # no markup: names may end in [q]
    for role, parameter, users in _shared(adapter):
        where = f"{role} of {len(users)} site" + "s" * (len(users) > 1)
        size, method = "x".join(map(str, parameter.shape)), str(adapter.sites[users[0]].method)
        table.add_row(*map(Text, (where, size, "shared", method, "", f"{parameter.numel():,}")))
    for name, (owner, attribute) in adapter.whole.items():
        tensor = stored(owner, attribute)
        table.add_row(Text(name), "x".join(map(str, tensor.shape)), "whole", "", "", f"{tensor.numel():,}")
    base = sum(p.numel() for n, p in adapter.model.named_parameters() if ".svdpeft." not in f".{n}")
    table.add_section()
    share = f"{adapter.trainable_count / base:.3%} of {base:,}"
    table.add_row("total", share, "", "", "", f"{adapter.trainable_count:,}", style="bold")
    lines = [repr(adapter), _render(table)]
    left = Counter((_blocks(name), reason) for name, reason in adapter.skipped.items())
    vectors = _vectors(adapter)
    if left or vectors:
        lines.append("not adapted:")
        lines += [f"  {name}{f' ×{count}' if count > 1 else ''}: {why}" for (name, why), count in left.items()]
    if vectors:
        lines.append(
            f"  {len(vectors)} vectors (biases, norms and the like, {sum(vectors):,} values): train= names what trains"
        )
    return "\n".join(lines)


def _shared(adapter: Adapter) -> list[tuple[str, Tensor, list[str]]]:
    """What several sites train together: name, parameter, sites."""
    found: dict[int, tuple[str, Tensor, list[str]]] = {}
    for name, site in adapter.sites.items():
        for role in site.factors.tied:
            parameter = getattr(site.factors, role)
            if parameter.requires_grad:
                found.setdefault(id(parameter), (role, parameter, []))[2].append(name)
    return list(found.values())


def _vectors(adapter: Adapter) -> list[int]:
    """Sizes of the parameters of the base that are no matrices and do not train."""
    known = {id(weight.tensor) for weight in weights_of(adapter.model)}
    base = ((name, p) for name, p in adapter.model.named_parameters() if ".svdpeft." not in f".{name}")
    return [p.numel() for name, p in base if id(p) not in known and name not in adapter.whole]


def _blocks(name: str) -> str:
    """``blocks.3.attn`` -> ``blocks.*.attn``, so that repeated blocks share a row."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _render(table: Table) -> str:
    console = Console(file=io.StringIO(), width=140, color_system=None)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())
