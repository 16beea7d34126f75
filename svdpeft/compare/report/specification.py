"""How to do it again: the specification as TOML, and what to cite."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import svdpeft
from svdpeft.compare.report.results import Results
from svdpeft.registry import METHODS


def toml(results: Results) -> str:
    """Return the specification as a file that ``svdpeft compare`` takes; "" where the store has none."""
    if not results.spec:
        return ""
    spec = {name: value for name, value in results.spec.items() if value is not None}
    methods = spec.pop("methods")
    spec["search"] = results.spec.get("search") or False
    spec["budgets"] = ["none" if budget is None else budget for budget in spec["budgets"]]  # TOML has no null
    lines = [f"{name} = {_value(value)}" for name, value in spec.items()]
    lines += ["methods = ["]
    limited = any(budget != "none" for budget in spec["budgets"])
    for entry in methods:
        # What a budget decides is not asked for.
        name = entry["method"]["name"]
        knob = getattr(METHODS[name], "knob", None) if limited and name in METHODS else None
        method = {key: value for key, value in entry["method"].items() if key != knob}
        ours = {key: value for key, value in entry.items() if key != "method"}
        lines.append(f"    {_value({**ours, **method})},")
    return "\n".join([*lines, "]"]) + "\n"


def bibtex(results: Results) -> str:
    """Return the entries of every method that was run, and of the methods within them."""
    names: dict[str, None] = {}
    for record in results.records:
        _named(record["identity"]["method"], names)
    return svdpeft.cite(*(name for name in names if name in METHODS))


def _named(method: Mapping[str, Any], names: dict[str, None]) -> None:
    names[method["name"]] = None
    for value in method.values():
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            _named(value, names)


def _value(value: Any) -> str:
    """A TOML value; strings and floats are written as JSON writes them, which TOML reads."""
    if isinstance(value, Mapping):
        pairs = (f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None)
        return "{ " + ", ".join(pairs) + " }" if value else "{}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)
