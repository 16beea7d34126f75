"""Patterns: how users name weights, the same everywhere (targets, exclude, train, a rank per site)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")
BRACKETS = re.compile(r"(.*[\w)])\[([A-Za-z]\w*(?:\s*,\s*[A-Za-z]\w*)*)\]")  # qkv[q,v]: a pattern, and words


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` names ``name``: exactly, as a suffix of whole dotted parts, or as a regular expression.

    Of a fused weight ``qkv[q,v]`` names the parts ``qkv[q]`` and ``qkv[v]``.

    Example:
        >>> matches("attn.qkv", "blocks.0.attn.qkv"), matches("kv", "blocks.0.attn.qkv"), matches(".*qkv", "a.qkv")
        (True, False, True)
    """
    if name == pattern or name.endswith("." + pattern):
        return True
    layer, _, part = name.removesuffix("]").partition("[")
    if part and (found := BRACKETS.fullmatch(pattern)) is not None:
        return part in re.split(r"\s*,\s*", found[2]) and matches(found[1], layer)
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} is neither a name nor a regular expression: {error}") from error


def chosen(value: T | Mapping[str, T], site: str, roles: Sequence[str] = (), what: str = "rank") -> T:
    """Return a hyper-parameter at one site: the value, or of a mapping that of the first pattern that matches.

    Args:
        value: for all sites, or a mapping from pattern to value.
        site: its name; a part also goes by the name of its layer.
        roles: its further names.
        what: name of the hyper-parameter, for the message.

    Raises:
        ValueError: no pattern matches.

    Example:
        >>> chosen({"qkv": 8, ".*": 4}, "blocks.0.attn.qkv[q]"), chosen({"qkv": 8, ".*": 4}, "blocks.0.mlp.fc1")
        (8, 4)
    """
    if not isinstance(value, Mapping):
        return value
    names = (site, site.partition("[")[0], *roles)
    for pattern, found in value.items():
        if any(matches(pattern, name) for name in names):
            return found
    raise ValueError(f"no pattern of {what}={dict(value)!r} matches {site}; '.*' matches the rest")
