"""What a hyper-parameter may be, and how it is written."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


def check_numbers(parameters: Any) -> None:
    """Refuse hyper-parameters, the fields of a dataclass, that are no numbers, or no whole ones where they count."""
    for name, type_ in ((f.name, f.type) for f in dataclasses.fields(parameters)):
        value = getattr(parameters, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} {value} is not a finite number")
        if type_ in ("int", "int | None") and isinstance(value, (float, bool)):
            raise ValueError(f"{name} {value!r} is not a whole number")


def plain(value: Any) -> Any:
    """A hyper-parameter as JSON: a class with parts that are classes takes those parts as mappings, too."""
    if hasattr(value, "to_json"):
        return value.to_json()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
