"""What is in effect in the calls of one thread or task, and not in the model: which sites act, and on which rows.

A block such as ``adapter.disabled()`` writes here and leaves the model alone, so that threads with blocks of their own
do not disturb each other. It costs a look at a context variable where a layer is called.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

Scope = Mapping[Any, Any]  # by site, adapter or layer: what holds of it, in the place of what the model says

_SCOPE: ContextVar[Scope | None] = ContextVar("svdpeft_scope", default=None)
_latest: Scope | None = None  # of whatever thread, for a compiler that cannot look into context variables
TRACED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)  # Dynamo can, and guards on what it has found
_KEY = "svdpeft_scope"  # of what torch hands on to the threads in which it runs backward


def scope() -> Scope | None:
    """What holds here; ``None``: what the model says."""
    if torch.compiler.is_compiling():
        return _SCOPE.get() if TRACED else _latest
    found = _SCOPE.get()
    if found is None and torch._C._current_graph_task_id() != -1 and torch._C._is_key_in_tls(_KEY):
        return torch._C._get_obj_in_tls(_KEY)  # activations are recomputed in a thread of autograd's
    return found


def _set(found: Scope) -> None:
    global _latest
    _latest = found or None
    _SCOPE.set(_latest)
    torch._C._stash_obj_in_tls(_KEY, _latest)


@contextmanager
def within(changes: Scope) -> Iterator[None]:
    """Within the block something else holds in this thread or task."""
    before = scope() or {}
    _set({**before, **changes})
    try:
        yield
    finally:
        rest = {key: value for key, value in (scope() or {}).items() if key not in changes}
        _set(rest | {key: before[key] for key in changes if key in before})


def leave(*keys: Hashable) -> None:
    """Let hold of some keys what the model says, until the block ends that has written them."""
    _set({key: value for key, value in (scope() or {}).items() if key not in keys})
