"""Progress bars on long work, of tqdm, that no other process and no thread has a hand in."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


class Bar(tqdm):
    """A bar with a lock of its own process, and without the thread that watches over bars.

    tqdm's own lock is a semaphore that processes share: one that was forked and is killed while it draws a bar leaves
    all others waiting for ever.
    """

    _lock: Any = threading.RLock()
    monitor_interval = 0


def bar(
    items: Iterable[Any] | None = None, *, what: str, unit: str, total: int | None = None, hidden: bool = False
) -> Any:
    """Return a bar over ``items``, or one that is moved by ``update()``.

    It comes after two seconds, goes when the work is done, and is not there where nobody looks: in a file, or where
    standard error is no terminal.

    Args:
        items: what is gone through.
        what: is done.
        unit: of the items.
        total: how many there are, where ``items`` does not know.
        hidden: never show it.

    Example:
        >>> sum(bar([1, 2, 3], what="add", unit="number"))
        6
    """
    return Bar(items, desc=what, unit=unit, total=total, delay=2, leave=False, disable=hidden or None)


def _unlock() -> None:
    Bar._lock = threading.RLock()  # which a thread of the parent may have held


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)
