"""Processes that save one adapter after the other and are killed: a program, which forks them.

    python tests/torture/saving.py FOLDER KILLS

Adapter number n has the rank 1 + n % 3 and n in every value of L, so that parts of two of them are seen.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import nn

import svdpeft
from svdpeft.adapter.file import HEADER, TENSORS


def base() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4, dtype=torch.float64)).requires_grad_(False)


def adapter_of(model: nn.Module, number: int) -> svdpeft.Adapter:
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=1 + number % 3), ["0"])
    with torch.no_grad():
        for site in adapter.sites.values():
            site.factors.L.fill_(number)
            site.factors.A.fill_(-number)
    return adapter


def number_in(folder: Path) -> int:
    """Which adapter a folder holds, read as anybody would; it must be all of one."""
    model = base()
    adapter = svdpeft.load(model, folder, check_base=False, verify=True)
    (site,) = adapter.sites.values()
    left, right = site.factors.L, site.factors.A
    number = int(left.flatten()[0])
    assert (left == number).all()
    assert (right == -number).all()
    assert left.shape[-1] == site.method.rank == 1 + number % 3
    return number


def dying_at(number: int) -> Callable[[str, str], None]:
    """``os.replace`` that kills its process at a rename.

    Args:
        number: twice that of the rename, one less to die before it; 0: never.
    """
    moves, move = 0, os.replace

    def replace(source: str, target: str) -> None:
        nonlocal moves
        moves += 1
        if moves == (number + 1) // 2 and number % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        move(source, target)
        if moves == (number + 1) // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    return replace


def loop(folder: Path, first: int, count: int, die_at: int, say: Callable[[int], object]) -> None:
    """Save adapters; what ends it is a kill from outside, or one at a rename."""
    os.replace = dying_at(die_at)
    model = base()
    for number in range(first, first + count):
        adapter = adapter_of(model, number)
        adapter.save(folder)
        adapter.detach()
        say(number)


@contextmanager
def writing(folder: Path, first: int = 1, count: int = 10**9, die_at: int = 0) -> Iterator[tuple[int, IO[str]]]:
    """The loop in a process of its own, which is there at once: its number, and what it has saved, line by line."""
    reading, saying = os.pipe()
    process = os.fork()
    if not process:
        os.close(reading)
        status = 1
        try:
            loop(folder, first, count, die_at, lambda number: os.write(saying, b"%d\n" % number))
            status = 0
        finally:
            os._exit(status)
    os.close(saying)
    with open(reading) as said:
        yield process, said


def ended(process: int) -> int:
    """The exit status, or the signal as a negative number, of a process that has been waited for."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed(folder: Path, die_at: int = 0, seconds: float = 0.0) -> None:
    """Let a loop be killed, and look at what it leaves.

    Args:
        folder: of the adapter; what is there from before may be there after it.
        die_at: twice the number of a rename, one less to die before it; 0: it is killed from outside.
        seconds: after its first save at which it is.
    """
    before = number_in(folder) if (folder / TENSORS).exists() else 0
    with writing(folder, before + 1, die_at=die_at) as (process, said):
        lines = []
        if not die_at:
            lines.append(said.readline())
            time.sleep(seconds)
            os.kill(process, signal.SIGKILL)
        lines += said.readlines()
        assert ended(process) == -signal.SIGKILL, "it ended by itself"
    last = max((int(line) for line in lines), default=before)
    found = number_in(folder) if (folder / TENSORS).exists() else 0
    assert last <= found <= last + 1, f"adapter {last} was saved, and {found} is there"
    if die_at in (2, 3) and not before:
        assert found == 1, "the tensors' file alone is an adapter"
        assert not (folder / HEADER).exists()


def kills(folder: Path, count: int, seed: int) -> None:
    """So many kills in one folder, at drawn moments: half at renames, half anywhere."""
    draw = random.Random(seed)
    for _ in range(count):
        if draw.random() < 0.5:
            killed(folder, die_at=draw.randint(1, 12))
        else:
            killed(folder, seconds=draw.random() * 0.05)


def read_beside_a_writer(folder: Path, reads: int) -> None:
    """A reader never gets the header of one adapter with the tensors of another, which have other shapes."""
    with writing(folder) as (process, said):
        said.readline()
        found = [number_in(folder) for _ in range(reads)]
        os.kill(process, signal.SIGKILL)
        ended(process)
    assert found == sorted(found)
    assert len(set(found)) > reads // 20, "the two were not at work at once"


def write_beside_a_writer(folder: Path, saves: int) -> None:
    """Two writers end well, each save of theirs, and at every moment there is one adapter of theirs."""
    adapter_of(base(), 1).save(folder)
    with writing(folder, 1, saves) as (one, _), writing(folder, 100_001, saves) as (other, _):
        left = {one, other}
        while left:
            assert number_in(folder) % 100_000 <= saves
            for process in list(left):
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    assert status == 0, "a save beside another one has failed"
                    left.remove(process)
    assert sorted(file.name for file in folder.iterdir()) == [HEADER, TENSORS]


def main(folder: Path, count: int) -> None:
    """All of it, in folders of its own; ``count`` kills."""
    begun = time.monotonic()
    for die_at in range(1, 9):
        killed(folder / f"{die_at}", die_at)
    kills(folder / "kills", count, seed=0)
    read_beside_a_writer(folder / "reader", 20 * count)
    write_beside_a_writer(folder / "writers", 3 * count)
    told = f"{20 * count} reads beside a writer, {6 * count} saves of two beside each other"
    print(f"saves: {count + 8} kills, {told}, in {time.monotonic() - begun:.0f} s, nothing is lost", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
