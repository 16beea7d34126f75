"""What a hyper-parameter may be, and how it is written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from svdpeft.patterns import check_decide


def check_numbers(parameters: Any) -> None:
    """Refuse hyper-parameters, the fields of a dataclass, that are no numbers, or no whole ones where they count."""
    for name, type_ in ((f.name, f.type) for f in dataclasses.fields(parameters)):
        value = getattr(parameters, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} {value} is not a finite number")
        if type_ in ("int", "int | None") and isinstance(value, (float, bool)):
            raise ValueError(f"{name} {value!r} is not a whole number")


def check_patterns(parameters: Any, sites: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Refuse a pattern of a mapping, such as that of a rank, that decides for no site; ``".*"`` may be for no rest.

    Args:
        parameters: a method; those inside of it are looked at, too.
        sites: name and roles of each.

    Raises:
        ValueError: it matches none, or only such as one before it decides for.
    """
    for name in (f.name for f in dataclasses.fields(parameters)):
        value = getattr(parameters, name)
        if dataclasses.is_dataclass(value):
            check_patterns(value, sites)
        elif isinstance(value, Mapping):
            check_decide(value, sites, name)


def plain(value: Any) -> Any:
    """A hyper-parameter as JSON: a class with parts that are classes takes those parts as mappings, too."""
    if hasattr(value, "to_json"):
        return value.to_json()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
