"""Blocks in which an adapter is off, for the calls of one thread where that can be, or out of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from svdpeft.adapter.routing import must_be
from svdpeft.adapter.turns import turns
from svdpeft.sites.scope import within


@contextmanager
def disabled(adapter: Any) -> Iterator[None]:
    """What ``Adapter.disabled`` does."""
    what = f"disabled() of adapter {adapter.name!r}"
    if adapter.state == "disabled":  # a block within a block
        yield
        return
    must_be(adapter, "attached", "merged", "folded")
    with turns(adapter.model).block(what):  # its state stays what it is
        if adapter._state == "attached" and at_sites_alone(adapter):
            with within({adapter: "disabled", **dict.fromkeys(adapter.sites.values(), False)}):
                yield
            return
    with turns(adapter.model).change(what):
        before = adapter.state
        adapter.disable()
        try:
            yield
        finally:
            if adapter.state == "disabled":
                adapter.enable()
                adapter._to(before)


def at_sites_alone(adapter: Any) -> bool:
    """Whether an adapter acts where weights are used and nowhere else: parameters that it trains whole, statistics and
    the mode of normalisation layers are the model's, and so of all its callers."""
    return not adapter.own.places and adapter.frozen is None


@contextmanager
def unwritten(adapter: Any) -> Iterator[None]:
    """What ``Adapter.unwritten`` does."""
    must_be(adapter, "attached", "merged", "folded", "disabled")
    with turns(adapter.model).change(f"a change of adapter {adapter.name!r}"):
        before = adapter._state
        adapter._to("attached")
        try:
            yield
        finally:
            adapter._to(before)


def activate(adapter: Any, on: bool) -> None:
    """Let its sites act, or not, where no block says otherwise."""
    for site in adapter.sites.values():
        site.active = on
