"""Patterns: how users name weights, the same everywhere (targets, exclude, train, a rank per site)."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import regex

from svdpeft.registry import near_miss

T = TypeVar("T")
BRACKETS = re.compile(r"(.*[\w)])\[([A-Za-z]\w*(?:\s*,\s*[A-Za-z]\w*)*)\]")  # qkv[q,v]: a pattern, and words

PATIENCE = 2.0  # seconds of matching, after which an expression is given up
SLOW = 0.01  # of one name, which takes microseconds


class Expression:
    """A regular expression of a user's, or of a file's, that ends: some take longer than the universe.

    Args:
        pattern: as ``re`` knows it.

    Raises:
        ValueError: it is none.
    """

    def __init__(self, pattern: str) -> None:
        try:
            re.compile(pattern)
            self.compiled = regex.compile(pattern)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{pattern!r} is neither a name nor a regular expression: {error}") from error
        self.pattern = pattern
        self.spent = 0.0  # seconds, of names that took too long each

    def matches(self, name: str) -> bool:
        """Whether it is all of a name.

        Raises:
            ValueError: it takes too long, with this name or with all so far.
        """
        begun = time.thread_time()
        try:
            found = self.compiled.fullmatch(name, timeout=PATIENCE) is not None
        except TimeoutError:
            self.spent = PATIENCE
        else:
            if (took := time.thread_time() - begun) < SLOW:
                return found
            self.spent += took
            if self.spent < PATIENCE:
                return found
        raise ValueError(
            f"the regular expression {self.pattern!r} has taken {PATIENCE:g} s, at last with {name!r}: it repeats what"
            " repeats itself, in more ways than can be tried"
        )


expression = functools.lru_cache(maxsize=1024)(Expression)


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
    return expression(pattern).matches(name)


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
