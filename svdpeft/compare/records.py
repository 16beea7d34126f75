"""What a record must hold to be reported, checked where it is read; and which records of a method count."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from svdpeft.compare import budget
from svdpeft.compare.store import Kind, Record
from svdpeft.methods.base import PerSite
from svdpeft.registry import METHODS


@dataclass(frozen=True)
class Maybe:
    """A value of this shape, or null."""

    shape: Any


@dataclass(frozen=True)
class Each:
    """An object of any keys with values of this shape."""

    shape: Any


# A shape is a type, {key: shape} (a key with "?" may be absent), [shape] for a list of any length, (shape, shape) for
# one of that length. What was not finite is null in JSON.
NUMBER = int | float
MEASURED = int | float | None
BUDGET = str | int | None
DRIFTS = ("delta_sigma", "delta_d", "delta_d_assigned")
METHOD = {"name": str}
HEAD = {
    "label": str,
    "identity": {
        "model": str,
        "task": {"name": str, "train_size?": int | None},
        "method": METHOD,
        "lr": NUMBER,
        "seed": int,
        "budget": BUDGET,
        "epochs": NUMBER,
    },
    "error?": str,
    "undefined?": str,
    "diverged?": str,
}
TRIAL = HEAD | {"rung": int}
TRIED = {"metric": str, "value": MEASURED}
RUN = HEAD | {
    "svdpeft": str,
    "git": Maybe({"revision": str, "dirty": bool}),
    "python": str,
    "versions": Each(str),
    "machine": {"device": str},
    "date": str,
}
RESULT = {
    "method": {"text": str},
    "metric": {"name": str, "value": MEASURED},
    "items": Each([MEASURED]),
    "parameters": {"base": int, "factors": int, "trainable": int},
    **dict.fromkeys(("attach_seconds", "attach_warm_seconds", "step_seconds"), MEASURED),
    **dict.fromkeys(("peak_memory_bytes", "checkpoint_bytes", "merge_error", "reload_error", "distance"), MEASURED),
    "throughput": {"unit": str, "per_second": MEASURED},
    "forgetting": Maybe({"name": str, "before": MEASURED, "after": MEASURED}),
    "loss": [(NUMBER, MEASURED)],
    "spectra": Maybe({"steps": [NUMBER], "sites": [str], **{name: [[MEASURED]] for name in DRIFTS}}),
}
COMPARISON = {
    "spec": {
        "methods": [{"label": str, "method": METHOD, "lr": NUMBER}],
        "seeds": [int],
        "budgets": [BUDGET],
        "baseline?": str | None,
        "confidence?": MEASURED,
        "epochs?": NUMBER,
        "search?": Maybe({"seeds?": int}),
    }
}
NAMES = {str: "text", int: "a whole number", NUMBER: "a number", MEASURED: "a number", bool: "true or false"}


def finished(record: Record) -> bool:
    """Whether a run has a result: it did not fail or diverge, and its method is defined on the model."""
    return not {"error", "undefined", "diverged"} & record.keys()


def without_factors(method: Mapping[str, Any]) -> bool:
    """Whether a method trains parameters of the model alone: no budget holds it, and it is run once for all of them."""
    name = method["name"]
    return name in METHODS and not issubclass(METHODS[name], PerSite)


def check(kind: Kind, record: Record) -> None:
    """Refuse a record that the report cannot read, such as one of another version.

    Raises:
        ValueError: a field is missing or holds something else; it is named.
    """
    if kind == "trials":
        _fits(record, TRIAL | (TRIED if finished(record) else {}))
    else:
        _fits(record, RUN | (RESULT if finished(record) else {}))
    for name in ("lr", "epochs"):
        if not 0 < (value := record["identity"][name]) < math.inf:
            raise ValueError(f"identity.{name} is {value:g}, not above 0")
    if kind == "trials" or not finished(record):
        return
    if (metric := record["metric"]["name"]) not in record["items"]:
        raise ValueError(f"has no items.{metric}, of its metric")
    if (limit := record["identity"]["budget"]) is not None:
        budget.parse(limit, record["parameters"]["base"])
    if spectra := record["spectra"]:
        size = len(spectra["steps"]), len(spectra["sites"])
        for name in DRIFTS:
            if len(spectra[name]) != size[0] or any(len(each) != size[1] for each in spectra[name]):
                raise ValueError(f"spectra.{name} is not a table of {size[0]} steps and {size[1]} sites")


def check_comparison(comparison: Record) -> None:
    """Refuse a ``comparison.json`` that says too little.

    Raises:
        ValueError: a field is missing or holds something else; it is named.
    """
    _fits(comparison, COMPARISON)
    confidence = comparison["spec"].get("confidence")
    if confidence is not None and not 0 < confidence < 1:
        raise ValueError(f"spec.confidence is {confidence:g}, which is outside (0, 1)")


def newest(records: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """Return the records that count, and the older ones whose place they took.

    A search that goes on after a failed trial may choose another rate: the runs at the rate of before stay where they
    are, but one row has one rate, that of the newest run. Of two runs with one seed the newer counts.
    """
    known = list(records)
    order = sorted(known, key=lambda r: (r["date"], finished(r), r["identity"]["lr"]))
    rates = {_row(record): record["identity"]["lr"] for record in order}
    places = {
        (_row(record), record["identity"]["seed"]): id(record)
        for record in order
        if record["identity"]["lr"] == rates[_row(record)]
    }
    count = set(places.values())
    return [r for r in known if id(r) in count], [r for r in known if id(r) not in count]


def _row(record: Record) -> tuple[str, str | int | None]:
    return record["label"], record["identity"]["budget"]


def _fits(value: Any, shape: Any, where: str = "") -> None:
    """Refuse a value of another shape; its place is named."""
    if isinstance(shape, Maybe):
        if value is not None:
            _fits(value, shape.shape, where)
    elif isinstance(shape, Each):
        _is(value, dict, "an object", where)
        for key, each in value.items():
            _fits(each, shape.shape, f"{where}.{key}")
    elif isinstance(shape, dict):
        _is(value, dict, "an object", where)
        for key, each in shape.items():
            name = key.removesuffix("?")
            place = f"{where}.{name}".lstrip(".")
            if name in value:
                _fits(value[name], each, place)
            elif name == key:
                raise ValueError(f"has no {place}")
    elif isinstance(shape, (list, tuple)):
        _is(value, list, "a list", where)
        if isinstance(shape, tuple) and len(value) != len(shape):
            raise ValueError(f"{where} has {len(value)} values, not {len(shape)}")
        for i, each in enumerate(value):
            _fits(each, shape[i] if isinstance(shape, tuple) else shape[0], f"{where}[{i}]")
    else:
        _is(value, shape, NAMES.get(shape, "text or a whole number"), where)


def _is(value: Any, kind: Any, name: str, where: str) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        text = json.dumps(value, ensure_ascii=False)
        raise ValueError(f"{where} is {text if len(text) <= 40 else text[:39] + '…'}, not {name}")
