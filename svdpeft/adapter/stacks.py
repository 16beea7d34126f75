"""The stacks of threads, which run on while one looks at them."""

from __future__ import annotations

import gc
import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

LOOKS = 100  # at a stack that ends in a generator: a thread that has begun in one, if it always does
_looking = threading.Lock()


def stack(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and those above it; of this thread, or of one that waits."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def owner(frame: FrameType) -> object:
    """Whose method a frame runs: the argument that is named ``self``; of this thread."""
    return frame.f_locals["self"] if frame.f_code.co_varnames[:1] == ("self",) else None


class Others:
    """What one who waits sees of all other threads."""

    def __init__(self) -> None:
        self._owners: dict[FrameType, object] = {}

    def stacks(self) -> dict[int, list[FrameType]]:
        """The stack of each, innermost frame first."""
        with _looking, _uncollected():
            frames = sys._current_frames()
            frames.pop(threading.get_ident())  # which would hold itself, and all others, until garbage is collected
            found = {thread: _whole(thread, frame) for thread, frame in frames.items()}
        present = {frame for frames in found.values() for frame in frames}
        self._owners = {frame: whose for frame, whose in self._owners.items() if frame in present}
        return found

    def owner(self, frame: FrameType) -> object:
        """``owner`` of a frame of theirs.

        It is asked once: before Python 3.13 the frame keeps a copy of its variables for who asks, and what is thrown
        out of that by the next may let the thread run on, and leave the frame, while it is copied.
        """
        if frame not in self._owners:
            with _looking, _uncollected():
                self._owners[frame] = owner(frame)
        return self._owners[frame]


def _whole(thread: int, frame: FrameType) -> list[FrameType]:
    """A generator that the thread has left since takes what was above it out of sight, and one looks again."""
    found = list(stack(frame))
    for _ in range(LOOKS):
        if not found or not found[-1].f_code.co_flags & inspect.CO_GENERATOR:
            break
        found = list(stack(sys._current_frames().get(thread)))
    return found


@contextmanager
def _uncollected() -> Iterator[None]:
    """Python 3.11 makes frames when they are asked for, which may begin to collect garbage, which may let the thread
    run on: then the frame above is gone, and its memory is another's. Later versions collect between instructions."""
    enabled = gc.isenabled() and sys.version_info[:2] == (3, 11)
    if enabled:
        gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
