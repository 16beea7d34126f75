"""A disk that loses what was not synced, played back from what a program did.

Only what POSIX promises is taken to hold: the bytes of a file are there once that file was synced, a name in a folder
once that folder was. Everything later may be there or not, each name by itself; of a file that was not synced there is
its first half, or nothing.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

CALLS = ("mkdir", "rename", "replace", "link", "unlink", "remove", "rmdir", "fsync")
Node = int  # a file or a folder, whatever it is called
ROOT, NOTHING = 0, -1


@dataclass(frozen=True)
class Moment:
    """What may be on the disk.

    Args:
        names: per folder and name what it may lead to: what was synced first, what the system says last.
        data: per file its bytes, and whether they are on the disk.
    """

    names: dict[Node, dict[str, list[Node]]]
    data: dict[Node, tuple[bytes, bool]]

    def after_a_cut(self, root: Path, draw: random.Random) -> None:
        """Make at ``root`` what the computer finds when the power has failed at this moment."""
        self._make(ROOT, root, draw)

    def _make(self, folder: Node, path: Path, draw: random.Random) -> None:
        path.mkdir()
        for name, nodes in self.names[folder].items():
            found = draw.choice(nodes)
            if found in self.data:
                content, synced = self.data[found]
                (path / name).write_bytes(content if synced else content[: draw.choice((0, len(content) // 2))])
            elif found != NOTHING:
                self._make(found, path / name, draw)


class Recorder:
    """Watches a folder while a program changes it.

    Args:
        root: what is in it at the start is on the disk.
    """

    def __init__(self, root: Path) -> None:
        self.moments: list[Moment] = []
        self._root, self._count = root, itertools.count(1)
        self._nodes: dict[int, Node] = {}  # by the number that the system gives it, and another one gives later
        self._names: dict[Node, dict[str, list[Node]]] = {}
        self._data: dict[Node, tuple[bytes, bool]] = {}
        self._look()
        for node in self._nodes.values():
            self._sync(node)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the moments before and after each call that changes the folder."""

        def wrapped(name: str, real: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                self._record()
                done = real(*args, **options)
                if name == "fsync":
                    self._sync(self._nodes.get(os.fstat(args[0]).st_ino))
                self._record()
                return done

            return call

        with mock.patch.multiple(os, **{name: wrapped(name, getattr(os, name)) for name in CALLS}):
            yield
        self._record()

    def _record(self) -> None:
        self._look()
        names = {node: {name: list(nodes) for name, nodes in of.items()} for node, of in self._names.items()}
        self.moments.append(Moment(names, dict(self._data)))

    def _sync(self, node: Node | None) -> None:
        if node in self._names:
            last = {name: nodes[-1] for name, nodes in self._names[node].items()}
            self._names[node] = {name: [found] for name, found in last.items() if found != NOTHING}
        elif node is not None:
            self._data[node] = self._data[node][0], True

    def _look(self) -> None:
        seen = {self._root.stat().st_ino: ROOT}
        self._walk(ROOT, self._root, seen)
        self._nodes = seen

    def _walk(self, folder: Node, path: Path, seen: dict[int, Node]) -> None:
        now: dict[str, Node] = {}
        for entry in os.scandir(path):
            inode = entry.inode()
            node = now[entry.name] = seen[inode] = self._nodes[inode] if inode in self._nodes else next(self._count)
            if entry.is_dir(follow_symlinks=False):
                self._walk(node, path / entry.name, seen)
            else:
                content, before = (path / entry.name).read_bytes(), self._data.get(node)
                self._data[node] = content, before == (content, True)
        known = self._names.setdefault(folder, {})
        for name in known.keys() | now.keys():
            nodes = known.setdefault(name, [NOTHING])
            if nodes[-1] != now.get(name, NOTHING):
                nodes.append(now.get(name, NOTHING))
