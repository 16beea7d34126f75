"""Work that is killed in a process of its own: before an operation on files that was drawn, or at a moment that was.

A fork of this process does it, so that nothing is imported or made again.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

BEGINS = "tempfile.mkdtemp"  # what ``atomic.replacing`` does first
OPERATIONS = {  # that the interpreter tells its auditors of, before each; "open" is what Python opens, also to sync it
    *(BEGINS, "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.scandir", "os.listdir"),
}

NOBODY = 65534


class Span(NamedTuple):
    """How long work is: operations on files, and seconds, from the first write of it on."""

    operations: int
    seconds: float


class Outcome(NamedTuple):
    """What became of work.

    Args:
        killed: or it has ended.
        span: of work that has ended.
    """

    killed: bool
    span: Span | None


def attempt(work: Callable[[], object], at: int = 0, after: float | None = None, begins: str = BEGINS) -> Outcome:
    """Let a fork do some work, and kill it.

    Args:
        work: that is done.
        at: the operation on files before which it is killed, counted from its first write; 0: none.
        after: seconds since its first write at which it is killed; ``None``: it is not.
        begins: the operation that is its first write.

    Raises:
        AssertionError: it has failed.
    """
    reading, saying = os.pipe()
    process = os.fork()
    if not process:
        _work(work, at, saying, begins)
    os.close(saying)
    with open(reading) as said:
        begun = said.readline() == "begun\n"
        if begun and after is not None:
            time.sleep(after)
            os.kill(process, signal.SIGKILL)
        rest = said.read().split()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the work has ended with {status}"
    return Outcome(status != 0, Span(int(rest[0]), float(rest[1])) if rest else None)


@contextmanager
def no_room(size: int = 100) -> Iterator[None]:
    """Within the block no file of more than so many bytes has room on the disk."""
    import resource  # not on Windows

    handler, before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Within the block this process may not write into a folder; that of root is somebody else's, and it stays so."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        yield
        return
    folder.chmod(0o500)
    try:
        yield
    finally:
        folder.chmod(0o700)


def draws(whole: Span, draw: random.Random) -> dict[str, Any]:
    """When work of such a length is killed: half of the time before an operation, else at any moment of it."""
    if draw.random() < 0.5:
        return {"at": draw.randint(1, max(whole.operations, 1))}
    return {"after": draw.random() * whole.seconds}


def _work(work: Callable[[], object], at: int, saying: int, begins: str) -> None:
    """What the fork does; it never returns."""
    seen, begun = 0, 0.0

    def see(event: str, args: Any) -> None:
        nonlocal seen, begun
        if event == begins and not begun:
            begun = time.monotonic()
            os.write(saying, b"begun\n")
        if begun and event in OPERATIONS:
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.addaudithook(see)
        work()
        with suppress(BrokenPipeError):
            os.write(saying, b"%d %f\n" % (seen, time.monotonic() - begun))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
