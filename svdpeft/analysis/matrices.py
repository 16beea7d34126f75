"""Which matrices of a model are looked at, and how the weight that the model computes with is read without a change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from svdpeft.adapter.adapter import Adapter
from svdpeft.layers.base import LayerKind
from svdpeft.layers.fused import parts_of
from svdpeft.layers.part import Part
from svdpeft.layers.quantised import weight as values_of
from svdpeft.layers.raw import Raw
from svdpeft.methods.base import Factored
from svdpeft.patterns import BRACKETS, matches
from svdpeft.registry import near_miss
from svdpeft.sites.site import Site
from svdpeft.targets.inventory import Weight, weights_of

Patterns = str | Sequence[str]


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight, or one part of it, as matrices (*b, m, n).

    Args:
        name: of the site.
        names: what patterns may call it.
        broad: the words ``"all"`` and, for linear kinds, ``"all-linear"`` mean it.
        linear: whether it multiplies the last axis of its input.
        base: gives W, at least float32.
        change: gives ΔW; ``None``: nothing adapts the weight.
        site: where it has factors.
    """

    name: str
    names: tuple[str, ...]
    broad: bool
    linear: bool
    base: Callable[[], Tensor]
    change: Callable[[], Tensor] | None = None
    site: Site | None = None

    @property
    def rank(self) -> int | None:
        """The rank of the site's method, where it has one."""
        method = None if self.site is None else self.site.method
        return method.rank if isinstance(method, Factored) and isinstance(method.rank, int) else None


def matrices_of(what: nn.Module | Mapping[str, Tensor] | Adapter, patterns: Patterns, word: str) -> list[Matrix]:
    """Return the matrices that patterns name.

    Args:
        what: a model, weights by name, or an adapter: then its sites, and the weights that it trains whole.
        patterns: ``"all"``, ``"all-linear"``, names, suffixes of dotted parts, or regular expressions that match the
            whole name or such a suffix (``"q_proj|v_proj"``); ``"qkv[q,v]"`` and ``"spectral[in,out,mode]"`` are parts
            of a fused weight and axes of a raw one.
        word: what the caller calls the patterns, for the message.

    Raises:
        ValueError: a pattern names nothing.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if isinstance(what, Adapter):
        known = [*map(_adapted, what.sites.values()), *_in_model(what.model, patterns, _trained_whole(what))]
    elif isinstance(what, nn.Module):
        known = _in_model(what, patterns)
    else:
        known = [_given(name, w) for name, w in what.items() if w.ndim >= 2 and w.is_floating_point()]
    chosen: dict[str, Matrix] = {}
    for pattern in patterns:
        found = [matrix for matrix in known if _names(pattern, matrix)]
        if not found:
            names = {n.removesuffix(".weight") for matrix in known for n in matrix.names if n}
            leaves = {n.rpartition(".")[2] for n in names} | {"all", "all-linear"}
            where = "that the adapter trains" if isinstance(what, Adapter) else "of the model"
            raise ValueError(f"{word}={pattern!r} matches no matrix {where} ({near_miss(pattern, leaves)})")
        chosen |= {matrix.name: matrix for matrix in found}
    ordered = [matrix for matrix in known if matrix.name in chosen]
    return _with_copies(what, ordered) if isinstance(what, Adapter) else ordered


def _names(pattern: str, matrix: Matrix) -> bool:
    if pattern in ("all", "all-linear"):
        return matrix.broad and (pattern == "all" or matrix.linear)
    return any(matches(pattern, n) or matches(rf"(?:.*\.)?(?:{pattern})", n) for n in matrix.names)


def _adapted(site: Site) -> Matrix:
    names = (site.name, *([site.name.partition("[")[0]] if site.part else []), *_with_axes(site.name, site.kind))
    return Matrix(site.name, names, True, site.kind.linear, site.base_matrix, site.matrix, site)


def _with_axes(name: str, kind: LayerKind) -> tuple[str, ...]:
    return (f"{name}[{','.join(kind.axes)}]",) if isinstance(kind, Raw) and kind.axes else ()


def _trained_whole(adapter: Adapter) -> set[int]:
    return {id(adapter.own[name]) for name in adapter.whole}


def _axes(patterns: Sequence[str], weight: Weight) -> tuple[str, ...]:
    """The names that a pattern such as ``spectral[in,out,mode]`` gives the axes of a raw parameter."""
    for found in filter(None, map(BRACKETS.fullmatch, patterns)):
        words = tuple(word.strip() for word in found[2].split(","))
        if {"in", "out"} <= set(words) and any(matches(found[1], name) for name in weight.names):
            return words
    return ()


def _in_model(model: nn.Module, patterns: Sequence[str], only: set[int] | None = None) -> list[Matrix]:
    """Every weight that is read as it is stored; each tied one once. ``only``: of these parameters."""
    found, seen = [], set()
    for weight in weights_of(model):
        w, kind = weight.tensor, weight.kind or Raw(_axes(patterns, weight))
        plain = weight.scheme is not None or (
            type(w) is nn.Parameter and w.is_floating_point() and w.layout is torch.strided and not w.is_meta
        )
        if not plain or id(w) in seen or (only is not None and id(w) not in only):
            continue
        seen.add(id(w))
        if isinstance(kind, Raw):
            kind.check_axes(weight.values, weight.name)
        names = (*weight.names, *_with_axes(weight.name, kind))
        above, _, leaf = weight.name.rpartition(".")
        parts = parts_of(kind, weight.module, weight.parameter, leaf, model.get_submodule(above))
        broad = weight.kind is not None and not weight.head
        if not (kind.split and parts):
            found.append(_stored(weight.name, names, broad, kind, weight.module, weight.parameter))
        total = kind.to_matrix(weight.module, weight.values).shape[-2]
        for part, rows in parts.items():
            name = f"{weight.name}[{part}]"
            part_of, called = Part(kind, rows, total), (name, *names) if kind.split else (name,)
            found.append(_stored(name, called, broad and kind.split, part_of, weight.module, weight.parameter))
    return found


def _stored(
    name: str, names: tuple[str, ...], broad: bool, kind: LayerKind, module: nn.Module, parameter: str
) -> Matrix:
    def read() -> Tensor:
        w = values_of(module, parameter).detach()
        return kind.to_matrix(module, w.to(torch.promote_types(w.dtype, torch.float32)))

    return Matrix(name, names, broad, kind.linear, read)


def _given(name: str, w: Tensor) -> Matrix:
    def read() -> Tensor:
        return w.detach().to(torch.promote_types(w.dtype, torch.float32))

    return Matrix(name, (name, name.removesuffix(".weight")), True, True, read)


def _with_copies(adapter: Adapter, matrices: list[Matrix]) -> list[Matrix]:
    """Of weights that train whole the base is gone once they have moved: a copy of the chosen ones is kept."""
    whole = [matrix for matrix in matrices if matrix.site is None]
    if not whole:
        return matrices
    with adapter.disabled(), torch.no_grad():
        copies = {matrix.name: _copied(matrix) for matrix in whole}

    def trained(matrix: Matrix) -> Matrix:
        def base() -> Tensor:
            return copies[matrix.name].to(matrix.base().device)

        return replace(matrix, base=base, change=lambda: matrix.base() - base())

    return [matrix if matrix.site is not None else trained(matrix) for matrix in matrices]


def _copied(matrix: Matrix) -> Tensor:
    return matrix.base().to("cpu", copy=True)  # not on the device, where it would count as the method's memory
