"""Processes that a launcher has started together: how many there are, and which of them does what."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock


def processes() -> tuple[int, int]:
    """Which one this is, from 0, and how many there are, as torch or the launcher says."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_share_first(count: int) -> list[int]:
    """The positions of ``count`` pieces of work: this process' share, then those of the next ones.

    With a folder in which finished work is found each process so does its share and then reads the others'.

    Example:
        >>> own_share_first(5)  # a single process
        [0, 1, 2, 3, 4]
    """
    me, together = processes()
    return sorted(range(count), key=lambda i: ((i - me) % together, i))


@contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """Within the block no other process of those that were started together is within one for this file.

    A process that ends without a word leaves it to the next.
    """
    lock = FileLock(f"{file}.lock")
    if processes()[1] > 1:
        with suppress(OSError):  # in a folder that cannot be written each works for itself
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
