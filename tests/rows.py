"""The rows of the property tests, by the registries: every method, every layer kind, and their pairs.

A default run has every method on one example of every kind of layer, in one of its variants, and every variant on some
layers that are called and some that are read: what is asked of one adapter at a time. What is asked of dtypes has every
method on one example of every kind (``of_each_kind``), what is asked of two adapters half of those, and what is asked
of files, switching and batches is asked in turn (``asked``). ``pytest --all`` has every variant on every example of
everything.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import pytest

from svdpeft.layers.base import CalledKind, LayerKind
from svdpeft.layers.quantising import SCHEMES
from svdpeft.methods.base import Method, PerSite
from svdpeft.registry import KINDS, METHODS

Kind = tuple[str, int]  # a registered name and the position of one of its example layers, or one of QUANTISED
T = TypeVar("T")

EVERYTHING = os.environ.get("SVDPEFT_TESTS") == "all"  # set by ``pytest --all``
# What is asked of a method on a kind in turn: one of them in a default run.
QUESTIONS = ("a file in another process", "a file without its bases", "switching", "a batch with an adapter per row")
AT_LEAST = 2  # called layers, and read ones, that every variant meets then

# Linear layers with a weight of integers: rows beside those of the registered kinds, by the name of their scheme.
QUANTISED: tuple[Kind, ...] = tuple((name, 0) for name in SCHEMES)
OTHERS = tuple(kind for kind in QUANTISED if kind[0] not in ("nf4", "int8"))  # a method meets one of them by default
# What they have not, by the word that a test asks with, and why.
INTEGERS = {
    "float64": "they are dequantised to 32 bits at most: such rows are in float32",
    "fold": "the weight without the start would be rounded again, and be that of another base: refused by name",
    "read": "integers cannot answer W0 + ΔW: refused by name",
    "training": "integers have no gradient: no weight trains whole, and none has one for a calibration",
}
LACKING = {name: INTEGERS for name, _ in QUANTISED}
for name in ("torchao-int8", "torchao-int4"):
    LACKING[name] = INTEGERS | {"pickle": "torchao's tensors cannot be pickled"}

# Hyper-parameters worth a row of their own. A method that is not listed gets its defaults at rank 2.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "lora": [{"rank": 2, "alpha": 3.0}, {"rank": 2, "alpha": 3.0, "rs": True}],
    "pissa": [{"rank": 2}, {"rank": 2, "alpha": 3.0}],
    "sorsa": [
        {"rank": 2},
        {"rank": 2, "alpha": 3.0},
        {"rank": None},
        {"rank": 2, "gamma": {"target": 0.1}, "allocate": {"target_rank": 1}},
    ],
    "adalora": [{"rank": 2}, {"rank": 2, "alpha": 3.0, "regulariser": "code", "scaling": "code"}],
    "svft": [
        {},
        {"pattern": "banded", "off_diagonals": 1},
        {"pattern": "random", "off_diagonals": 1},
        {"pattern": "topk", "off_diagonals": 1},
        {"rank": 2},
        {"rank": 2, "pattern": "banded", "off_diagonals": 1},
        {"pattern": "random", "off_diagonals": 1, "reference_init": True},
        {"reference_init": True, "rank": 2},
    ],
    "milora": [{"rank": 2}, {"rank": 2, "alpha": 3.0}],
    "olora": [{"rank": 2}, {"rank": 2, "alpha": 3.0}],
    "mica": [{"rank": 2, "alpha": 3.0}, {"rank": 2, "basis": "full"}],
    "kasa": [{"rank": 2}, {"rank": 2, "drop": 0}],
    "spectral-adapter": [{"rank": 2}, {"rank": 2, "values": True}],
    "spectral-adapter-r": [{"rank": 2}, {"rank": None}],
    "osf": [{}, {"rank": 2}],
    "svf": [{}, {"rank": 2}],
    "svdiff": [{}, {"rank": 2, "strength": -1.5}],
    "svf-transformer2": [{}, {"rank": 2}],
    "svfit": [{"rank": 2}, {"energy": 0.9}],
    "lora-xs": [{"rank": 2, "alpha": 3.0}, {"rank": 2, "std": 0.0}],
    "ssvd": [
        {"rank": 3},
        {"rank": None, "ratio": 1.0, "rotation": "free"},
        {"rank": 3, "rotation": "first-order", "side": "smaller", "reference_init": True},
    ],
    "psoft": [{"rank": 3}, {"rank": None, "rotation": "neumann", "terms": 3, "vectors": "output", "bound": 0.9}],
    "antipasto": [
        {"rank": 3},
        {"rank": None, "rotates": "both", "block": 2, "coefficient": -0.7},
        {"rank": 2, "rotates": "U", "reference_init": True},
    ],
    "corda": [{"rank": 2}, {"rank": 2, "mode": "kpm", "alpha": 3.0}],
    "lora-null": [{"rank": 2}, {"rank": 2, "version": "v2", "alpha": 3.0}],
    "eva": [{"rank": 2, "alpha": 3.0}, {"rank": 2, "rs": True, "rho": 1, "centred": True, "whiten": True}],
    "lora-ga": [{"rank": 2}, {"rank": 2, "variant": "peft", "alpha": None, "rs": False}],
    "moslora": [{"rank": 2, "alpha": 3.0}],
    "nlora": [{"rank": 2}, {"rank": 2, "alpha": 3.0, "sketch": "block", "only": "core"}],
    "oplora": [{"rank": 2, "alpha": 3.0, "protects": 2}],
    "astra": [{"rank": 2}, {"rank": 2, "alpha": 3.0, "end": "head"}],
    "sc-lora": [{"rank": 2}, {"rank": 2, "alpha": 3.0, "beta": 0.0}],
    "salt": [{"rank": 2, "ratio": 0.4}, {"rank": 2, "ratio": 0.6, "relu": True}],
    "ssvd-o": [{"rank": 3}, {"rank": 3, "outputs": 2, "inputs": 1}],
    "lora-dash": [{"rank": 2, "alpha": 3.0, "directions": 2, "warmup": 2}, {"rank": 2, "directions": 0}],
    "dislora": [{"rank": 2, "alpha": 3.0, "directions": 2, "warmup": 2}],
    "gora": [{"rank": 2, "least": 1, "most": 3}],
    "ditask": [{"cells": 5}, {"rank": 2, "cells": 8}],
    "nora": [{"rank": 3, "inner_rank": 2}],
    "loha": [{"rank": 2, "alpha": 3.0}],
    "lokr": [{"rank": 2, "alpha": 3.0}],
    "gralora": [{"rank": 2, "alpha": 3.0}],
    "stella": [{"rank": 2, "alpha": 3.0}],
    "vera": [{"rank": 2}, {"rank": 12}],
    "randlora": [{"rank": 2, "alpha": 3.0}, {"rank": 2, "alpha": None, "bases": "sparse", "gamma": "peft"}],
    "pica": [{"rank": 2}, {"rank": 2, "alpha": 3.0, "tied": False}],
    "tinylora": [{"u": 3}, {"u": 3, "tie": "all"}, {"u": 2, "tie": 2, "split": "both"}],
    "adamss": [{"rank": 2, "clusters": 2}, {"rank": 3, "clusters": 3, "cluster_rank": 2}],
    "frod": [{"density": 0.5}],
    "dora": [
        {"inner": {"name": "lora", "rank": 2, "alpha": 3.0}},
        {"inner": {"name": "sorsa", "rank": 2}, "magnitude": "columns", "norm_gradient": True},
        {"inner": {"name": "vera", "rank": 2}},
    ],
    "dude": [{"inner": {"name": "pissa", "rank": 2, "alpha": 3.0}}],
    "oft": [{"block_size": 3}, {"block_size": 2, "block_share": True, "neumann": 4, "eps": 0.1}],
    "boft": [{"block_size": 3}, {"block_size": 2, "butterflies": 2}],
    "flora": [{"rank": 1}, {"rank": 2}],
    "hira": [{"rank": 2}, {"rank": 5}],
    "ia3": [{}, {"side": "input"}],
    "hra": [{"rank": 2}, {"rank": 4, "gamma": 0.1}],
    "road": [{}, {"variant": 2}, {"variant": 4}],
    "fourierft": [{"frequencies": 30}, {"frequencies": 30, "alpha": 9.0, "reference_init": True}],
    "waveft": [{"frequencies": 30, "alpha": 9.0}],
    "vblora": [
        {"rank": 2, "vectors": 5, "vector_length": 3},
        {"rank": 3, "vectors": 4, "vector_length": 2, "top_k": 3, "reference_init": True},
    ],
    "goft": [{}, {"variant": "qgoft", "gamma": 0.1}],
    "loreft": [{"rank": 2}, {"rank": 3, "variant": "direft"}],
    "c3a": [{"block_size": 3}, {"block_size": 2, "reference_init": True}],
    "ether-plus": [{}, {"blocks": 2}],
    "full": [{}],
    "partial": [{"layers": ("layer",)}],
    "head-only": [{}],
}


def methods(factored: bool | None = None) -> list[Method]:
    """Every variant of every registered method; all, only the factored ones, or only the others."""
    found = []
    for name in METHODS:
        cls = METHODS[name]
        # Those that work on pairs of weights have no example layer: tests/test_clover.py.
        if (factored is None or cls.factored == factored) and not getattr(cls, "pairs", ()):
            ranked = any(field.name == "rank" for field in dataclasses.fields(cls))
            default: list[dict[str, Any]] = [{"rank": 2}] if ranked else [{}]
            found += [cls(**options) for options in VARIANTS.get(name, default)]
    return found


@functools.cache
def kinds() -> tuple[Kind, ...]:
    """Every example layer of every registered kind, and the quantised ones."""
    return tuple((name, i) for name in KINDS for i in range(len(KINDS[name]().examples()))) + QUANTISED


def has(kind: Kind, what: str) -> bool:
    """Whether a row's layer has what some have not, in the words of ``LACKING``."""
    return what not in LACKING.get(kind[0], {})


def states(kind: Kind) -> list[str]:
    """The states of an adapter that is switched on."""
    return ["attached", "merge", *(["fold"] if has(kind, "fold") else [])]


def layer_kind(kind: Kind) -> LayerKind:
    """What adapts the row's layer."""
    return KINDS["linear" if kind in QUANTISED else kind[0]]()


@functools.cache
def called(kind: Kind) -> bool:
    """Whether the example is one layer that is called, so that the factored path can be asked for."""
    found = layer_kind(kind)
    return isinstance(found, CalledKind) and found.called(found.examples()[kind[1]].module)


def defined(method: Method, kind: Kind) -> bool:
    """Whether the method is defined on the kind: no test has a row where it is not (see ``conftest``)."""
    return not isinstance(method, PerSite) or method.why_not(layer_kind(kind)) is None


def label(value: Any) -> str:
    if isinstance(value, Method):
        return f"{value.name}[{str(value).partition('(')[2][:-1]}]"
    return f"{value[0]}{value[1]}" if isinstance(value, tuple) else str(value)


def order(*row: Any) -> int:
    """A number that is drawn by the names in a row: a new method or kind does not change the choices of others."""
    return zlib.crc32(" ".join(map(label, row)).encode())


def some(options: Sequence[T], *row: Any) -> Sequence[T]:
    """All options with ``--all``, else the one that is this row's turn."""
    return options if EVERYTHING else [options[order(*row) % len(options)]]


def covering(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """The product of the axes with ``--all``, else as few of its rows as have every value of each axis."""
    values = [list(axis) for axis in axes]
    if EVERYTHING:
        return list(itertools.product(*values))
    return [tuple(axis[i % len(axis)] for axis in values) for i in range(max(map(len, values)))]


def variants(factored: bool | None = None) -> list[list[Method]]:
    """The methods, each as the list of its variants."""
    found: dict[str, list[Method]] = {}
    for method in methods(factored):
        found.setdefault(method.name, []).append(method)
    return list(found.values())


def one_of_each(factored: bool | None = None) -> list[Method]:
    """One variant of every method; with ``--all`` every one."""
    return [m for same in variants(factored) for m in some(same, same[0].name)]


@functools.cache
def pairs() -> tuple[tuple[Method, Kind], ...]:
    """A method and a layer, all that a run has."""
    return tuple((method, kind) for same in variants() for kind, its in spread(same).items() for method in its)


@functools.cache
def of_each_kind() -> tuple[tuple[Method, Kind], ...]:
    """A method and an example of every kind, the one that is their turn; with ``--all`` all pairs."""
    found: dict[tuple[str, str], list[tuple[Method, Kind]]] = {}
    for method, kind in pairs():
        found.setdefault((method.name, kind[0]), []).append((method, kind))
    return tuple(pair for names, same in found.items() for pair in some(same, *names))


def asked(question: str) -> list[tuple[Method, Kind]]:
    """The pairs of ``of_each_kind`` whose turn a question is: the next kind has the next question."""
    names = list(dict.fromkeys(name for name, _ in kinds()))
    turns = {(m, k): (order(m.name) + names.index(k[0])) % len(QUESTIONS) for m, k in of_each_kind()}
    return [pair for pair, turn in turns.items() if EVERYTHING or QUESTIONS[turn] == question]


def met(name: str) -> list[Kind]:
    """The examples that a method meets, by its name."""
    if EVERYTHING:
        return list(kinds())
    found: dict[str, list[Kind]] = {}
    for kind in kinds():
        if kind not in OTHERS or kind in some(OTHERS, name):
            found.setdefault(kind[0], []).append(kind)
    return [min(its, key=lambda kind: order(name, kind)) for its in found.values()]


def spread(same: list[Method]) -> dict[Kind, list[Method]]:
    """Which variants of one method meet which kinds: each kind one, each variant some kinds of either sort."""
    taken: dict[Kind, list[Method]] = {}
    mine = met(same[0].name)
    for kind in mine:
        possible = [method for method in same if defined(method, kind)]
        taken[kind] = possible if EVERYTHING else sorted(possible, key=lambda method: order(method, kind))[:1]
    for method in same:
        for sort in (True, False):
            possible = [kind for kind in mine if called(kind) == sort and defined(method, kind)]
            missing = AT_LEAST - sum(method in taken[kind] for kind in possible)
            others = [kind for kind in possible if method not in taken[kind]]
            for kind in sorted(others, key=lambda kind: order(kind, method))[: max(missing, 0)]:
                taken[kind].append(method)
    return taken


def rows(names: str, values: Iterable[tuple[Any, ...]]) -> pytest.MarkDecorator:
    """``parametrize`` with a label for every row."""
    values = list(values)
    return pytest.mark.parametrize(names, values, ids=["-".join(map(label, row)) for row in values])


every_factored = pytest.mark.parametrize("method", methods(factored=True), ids=label)
every_method = pytest.mark.parametrize("method", methods(), ids=label)
every_kind = pytest.mark.parametrize("kind", kinds(), ids=label)
every_called = pytest.mark.parametrize("kind", [kind for kind in kinds() if called(kind)], ids=label)
every_trainable = pytest.mark.parametrize("kind", [kind for kind in kinds() if has(kind, "training")], ids=label)
every_pair = rows("method, kind", pairs())
of_each = rows("method, kind", of_each_kind())
one_each = pytest.mark.parametrize("method", one_of_each(factored=True), ids=label)
