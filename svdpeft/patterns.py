"""Patterns: how users name weights, the same everywhere (targets, exclude, train, a rank per site)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from svdpeft.registry import near_miss

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
    pattern = _first(value, site, roles)
    if pattern is not None:
        return value[pattern]
    raise ValueError(f"no pattern of {what}={dict(value)!r} matches {site}; '.*' matches the rest")


def check_decide(patterns: Iterable[str], sites: Sequence[tuple[str, Sequence[str]]], what: str) -> None:
    """Refuse a pattern that decides for no site; ``".*"`` may be for no rest.

    Args:
        patterns: in the order in which they are tried.
        sites: name and roles of each.
        what: name of the hyper-parameter, for the message.

    Raises:
        ValueError: it matches none, or only such as one before it decides for.

    Example:
        >>> check_decide(["qkv", "0.qkv"], [("0.qkv", ())], "rank")
        Traceback (most recent call last):
        ValueError: '0.qkv' of rank has no effect: 'qkv', which stands before it, decides for 0.qkv
    """
    deciding = [_first(patterns, site, roles) for site, roles in sites]
    for pattern in patterns:
        if pattern in deciding or pattern == ".*":
            continue
        hidden = [(d, site) for d, (site, roles) in zip(deciding, sites, strict=True) if _first([pattern], site, roles)]
        if hidden:
            before, site = hidden[0]
            raise ValueError(
                f"{pattern!r} of {what} has no effect: {before!r}, which stands before it, decides for {site}"
            )
        known = {site.rpartition(".")[2] for site, _ in sites} | {role for _, roles in sites for role in roles}
        raise ValueError(f"{pattern!r} of {what} matches no site that is adapted: {near_miss(pattern, known)}")


def _first(patterns: Iterable[str], site: str, roles: Sequence[str]) -> str | None:
    """The pattern that decides for a site; a part also goes by the name of its layer."""
    names = (site, site.partition("[")[0], *roles)
    return next((pattern for pattern in patterns if any(matches(pattern, name) for name in names)), None)
