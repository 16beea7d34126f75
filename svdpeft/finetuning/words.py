"""Options as they are written: ``key=value`` words, TOML, and what a model's name says of it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

from svdpeft.methods.base import Method, PerSite
from svdpeft.registry import TASKS


def read_values(words: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` words; a value is a number, a truth, a list, or else a string.

    Example:
        >>> read_values(["rank=8", "pattern=banded", "rs=true"])
        {'rank': 8, 'pattern': 'banded', 'rs': True}
    """
    table: dict[str, Any] = {}
    for word in words:
        key, equals, value = str(word).partition("=")
        if not equals:
            raise ValueError(f"{word!r}: write an option as key=value")
        if re.fullmatch(r"true|false|\[.*\]", value):
            table[key] = parse(f"v = {value}".encode(), word)["v"]
        else:
            table[key] = as_number(value)
    return table


def as_number(text: str) -> int | float | str:
    """Read a number, or leave the text as it is."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def parse(data: bytes, where: str) -> dict[str, Any]:
    """Read TOML; ``where`` it is from, for the message."""
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # no text, no TOML, or more levels than tomllib calls itself for
        raise ValueError(f"{where}: {error}") from error


def modality_of(model: str, task: str | None) -> str:
    """Where the defaults come from: the task if it is given, else what the model's name says."""
    if task is not None:
        return TASKS[task].modality
    from svdpeft.models import vision
    from svdpeft.models.own import architecture_of, is_factory

    ours = model in vision.EMBEDDED or model.startswith("timm:") or is_factory(model)
    return "vision" if ours or architecture_of(Path(model)) is not None else "language"


def check_preserve(preserve: str | None, methods: Sequence[Method]) -> None:
    """Refuse data to be kept that no method asks for, and a method that asks for some where there are none."""
    asking = [method for method in methods if isinstance(method, PerSite) and method.preserves]
    if asking and preserve is None:
        raise ValueError(
            f"{asking[0]} starts from data whose outputs are to stay, too: name a file or folder of such, preserve=PATH"
        )
    if preserve is not None and not asking:
        given = ", ".join(map(str, methods))
        raise ValueError(
            f"preserve={preserve!r}: none of {given} starts from data whose outputs are to stay; leave it out"
        )
