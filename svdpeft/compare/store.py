"""One run, one JSON file: what makes a comparison resumable and its numbers traceable.

A store is a folder of plain files, on this machine or at any address that fsspec opens::

    DIR/comparison.json        what is compared
    DIR/runs/<name>.json       one run: a method with a seed
    DIR/trials/<name>.json     one try of a learning rate
    DIR/adapters/<name>/       the adapter of a run, where it is kept
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import numbers
import os
import posixpath
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

import fsspec
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem

from svdpeft.atomic import replacing
from svdpeft.registry import near_miss

Kind = Literal["runs", "trials"]
Record = dict[str, Any]

OF_THE_REPORT = ("baseline", "confidence")  # fields of a specification that change no run
READERS = 16  # files that are read at once: an object store answers each after a while


@dataclass(frozen=True)
class Damaged:
    """A file that is no record, and why."""

    path: str
    reason: str


class Store:
    """The files of one comparison. Nothing is made before the first file is written; several may write at once.

    A file is there whole or not at all: a local one is written beside its place, flushed to the disk and moved;
    anywhere else it is one put, which object stores do whole.

    Args:
        address: a folder, or an address that fsspec opens, such as ``s3://bucket/comparison``.

    Raises:
        ValueError: fsspec knows no such protocol; the near miss is named.

    Example:
        >>> store = Store("memory://example")
        >>> name = store.name("SVFT banded", {"seed": 0})
        >>> name
        'svft-banded-seed0-de7d7744cc'
        >>> store.write("runs", name, {"label": "SVFT banded", "identity": {"seed": 0}, "loss": float("nan")})
        >>> store.done("runs", name), store.load("runs", name)["loss"]
        (True, None)
    """

    def __init__(self, address: str | Path) -> None:
        protocol = fsspec.core.split_protocol(str(address).partition("::")[0])[0]
        known = fsspec.available_protocols()
        if protocol is not None and protocol not in known:
            raise ValueError(f"no storage is called {protocol!r} ({address}): {near_miss(protocol, known)}")
        self._files, self._root = fsspec.url_to_fs(str(address))
        self._local = isinstance(self._files, LocalFileSystem)
        # A worker opens it again, perhaps with another working directory: a local address is absolute.
        self.address: str = self._root if self._local else str(address).rstrip("/")

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.address,)

    def __repr__(self) -> str:
        return f"Store({self.address!r})"

    def name(self, label: str, identity: Mapping[str, Any]) -> str:
        """Return the name of the run with this identity; anything that changes its result changes the name."""
        digest = hashlib.sha256(json.dumps(_plain(identity, "identity"), sort_keys=True).encode()).hexdigest()[:10]
        readable = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:80] or "run"
        return f"{readable}-seed{identity['seed']}-{digest}"

    def path(self, kind: Kind, name: str) -> str:
        """Return where a record lies, for people."""
        return f"{self.address}/{kind}/{name}.json"

    def done(self, kind: Kind, name: str, check: Callable[[Record], None] = lambda record: None) -> bool:
        """Whether the record is there, whole and without an error; else the run is to be done (again).

        Args:
            kind, name: of the record.
            check: raises ``ValueError`` for a record that is not whole.
        """
        try:
            check(record := self.load(kind, name))
        except (FileNotFoundError, ValueError):
            return False
        return "error" not in record

    def load(self, kind: Kind, name: str) -> Record:
        """Read one record.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is damaged; it and the reason are named.
        """
        return self._object(f"{kind}/{name}.json", "identity")

    def write(self, kind: Kind, name: str, record: Mapping[str, Any]) -> None:
        """Write one record, whole or not at all, as JSON that browsers read: what is not finite becomes ``null``.

        Raises:
            TypeError: a value that JSON has no form for; its place in the record is named.
        """
        self.write_bytes(f"{kind}/{name}.json", _dump(_plain(record, self.path(kind, name))))

    def read(
        self, kind: Kind, check: Callable[[Record], None] = lambda record: None
    ) -> tuple[list[Record], list[Damaged]]:
        """Return every record and every damaged file, in the order of their names.

        Args:
            kind: of records.
            check: raises a ValueError for a record that is of no use; its file counts as damaged.
        """
        self._files.invalidate_cache()  # other processes write too
        try:
            listed: list[str] = self._files.ls(f"{self._root}/{kind}", detail=False)
        except FileNotFoundError:
            return [], []
        names = sorted(posixpath.basename(path) for path in listed)

        def one(name: str) -> Record | Damaged | None:
            try:
                record = self._object(f"{kind}/{name}", "identity")
                check(record)
                return record
            except FileNotFoundError:  # deleted since it was listed
                return None
            except ValueError as error:
                path = f"{self.address}/{kind}/{name}"
                return Damaged(path, str(error).removeprefix(f"{path}: "))

        with ThreadPoolExecutor(READERS) as pool:
            found = list(pool.map(one, [n for n in names if n.endswith(".json") and not n.startswith(".")]))
        return [each for each in found if isinstance(each, dict)], [each for each in found if isinstance(each, Damaged)]

    def comparison(self) -> Record | None:
        """Return what is compared here; ``None`` where nothing is said.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            return self._object("comparison.json", "spec")
        except FileNotFoundError:
            return None

    def claim(self, comparison: Mapping[str, Any]) -> None:
        """Write down what is compared here; more seeds and more methods extend what is there.

        Two that extend a comparison in an object store at the same moment may lose one of the extensions (not its
        runs) until the next claim; in a local folder they wait for each other.

        Args:
            comparison: with a ``"spec"``, of which ``"seeds"`` and ``"methods"`` (by ``"label"``) may grow.

        Raises:
            ValueError: another comparison lies here, or its file is damaged.
        """
        new: Record = _plain(comparison, "comparison")
        with self._alone():
            old = self.comparison()
            if old is None and not self._local:
                try:  # somebody else may be as early
                    return self._files.pipe_file(f"{self._root}/comparison.json", _dump(new), mode="create")
                except FileExistsError:
                    old = self.comparison()
            merged = new if old is None else {**new, "spec": _union(old["spec"], new["spec"], self.address)}
            if merged != old:
                self.write_bytes("comparison.json", _dump(merged))
        return None

    def write_text(self, name: str, text: str) -> None:
        """Write a file such as ``report.md`` beside the runs, whole or not at all."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file such as ``pictures/loss.png`` beside the runs, whole or not at all."""
        path = f"{self._root}/{name}"
        if self._local:
            with replacing(path) as new:
                new.write_bytes(data)
        else:
            self._files.pipe_file(path, data)

    def keep_folder(self, name: str, folder: Path) -> None:
        """Copy a folder of files to ``name`` beside the runs, file by file in the order of their names."""
        for file in sorted(folder.iterdir()):
            self.write_bytes(f"{name}/{file.name}", file.read_bytes())

    def has_file(self, name: str) -> bool:
        """Whether there is a file such as ``report.md`` beside the runs; it is whole then."""
        return bool(self._files.isfile(f"{self._root}/{name}"))

    def has_folder(self, name: str) -> bool:
        """Whether there is a folder of this name."""
        return bool(self._files.isdir(f"{self._root}/{name}"))

    def remove_folder(self, name: str) -> None:
        """Delete a folder, where it is there."""
        if self.has_folder(name):
            self._files.rm(f"{self._root}/{name}", recursive=True)

    def _object(self, name: str, part: str) -> Record:
        """Read a file that holds an object with ``part`` in it."""
        data = self._files.cat_file(f"{self._root}/{name}")
        where = f"{self.address}/{name}"
        try:
            record = json.loads(data, parse_constant=lambda _: None, parse_int=_integer)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: no valid JSON ({len(data):,} bytes): {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: holds a {type(record).__name__}, not an object")
        if not isinstance(record.get(part), dict):
            raise ValueError(f"{where}: has no {part!r}")
        return record

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the local folder's lock; an object store has none."""
        if not self._local:
            yield
            return
        os.makedirs(self._root, exist_ok=True)
        with FileLock(f"{self._root}/.comparison.lock"):
            yield


def _integer(text: str) -> int:
    """A number that a float can be, as all that is compared is."""
    if abs(value := int(text)) > sys.float_info.max:
        raise ValueError(f"the number {text[:20]}… of {len(text)} digits")
    return value


def _plain(value: Any, where: str) -> Any:
    """Return a value as JSON has it: NaN and infinity are null."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each, f"{where}.{key}") for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each, f"{where}[{i}]") for i, each in enumerate(value)]
    raise TypeError(f"{where} is a {type(value).__name__}, for which JSON has no form: {value!r}")


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _union(old: Record, new: Record, folder: str) -> Record:
    """Return a specification with the seeds and methods of both; refuse one that differs in anything else."""

    def same(field: str, there: Any, here: Any) -> None:
        if isinstance(there, dict) and isinstance(here, dict):
            for key in sorted(there.keys() | here.keys()):
                same(f"{field}.{key}", there.get(key), here.get(key))
        elif there != here:
            raise ValueError(
                f"{folder} holds another comparison: {field} is {_shown(there)} there and {_shown(here)} here; "
                f"take another --out for this one"
            )

    for field in sorted((old.keys() | new.keys()) - {"seeds", "methods", *OF_THE_REPORT}):
        same(field, old.get(field), new.get(field))
    methods = {entry["label"]: entry for entry in old.get("methods", [])}
    for entry in new.get("methods", []):
        same(f"methods[{entry['label']!r}]", methods.setdefault(entry["label"], entry), entry)
    kept = {field: old[field] for field in OF_THE_REPORT if new.get(field) is None and field in old}  # null: not given
    seeds = sorted({*old.get("seeds", []), *new.get("seeds", [])})
    return {**new, **kept, "seeds": seeds, "methods": list(methods.values())}


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value, ensure_ascii=False)
