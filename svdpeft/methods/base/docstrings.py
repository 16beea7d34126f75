"""Arguments are described once, where they are declared: a class's docstring takes over what it inherits."""

from __future__ import annotations

import inspect
import re

ENTRY = re.compile(r"    (\w+): ")  # the first line of an entry, in a docstring whose common indent was taken away


def inherit_args(cls: type) -> None:
    """Give the docstring of a dataclass the entries of its ``Args`` that its bases have, in the order of the fields.

    Args:
        cls: as it is created, before the decorator has made a dataclass of it.
    """
    if "__doc__" not in vars(cls) or cls.__doc__ is None:
        return
    lines = inspect.cleandoc(cls.__doc__).split("\n")
    known: dict[str, list[str]] = {}
    for base in reversed(cls.__mro__[1:]):
        known |= entries(inspect.cleandoc(vars(base).get("__doc__") or "").split("\n"))
    own = entries(lines)
    declared = [name for base in reversed(cls.__mro__) for name in vars(base).get("__annotations__", {})]
    order = dict.fromkeys([*declared, *own])
    found = {name: own.get(name, known.get(name)) for name in order}
    args = [line for entry in found.values() if entry for line in entry]
    if not args:
        return
    start, stop = section(lines)
    cls.__doc__ = "\n".join([*lines[:start], *([""] if start == stop else []), "Args:", *args, *lines[stop:]])


def section(lines: list[str]) -> tuple[int, int]:
    """Where the ``Args`` of a docstring begin and end; where there are none, before its example or at its end."""
    if "Args:" in lines:
        start = lines.index("Args:")
        return start, next((i for i in range(start + 1, len(lines)) if not lines[i].startswith("    ")), len(lines))
    at = lines.index("Example:") - 1 if "Example:" in lines else len(lines)
    return at, at


def entries(lines: list[str]) -> dict[str, list[str]]:
    """The entries of the ``Args`` of a docstring: name -> its lines."""
    start, stop = section(lines)
    found: dict[str, list[str]] = {}
    for line in lines[start + 1 : stop]:
        if entry := ENTRY.match(line):
            found[entry[1]] = [line]
        elif found:
            found[next(reversed(found))].append(line)
    return found
