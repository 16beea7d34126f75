"""Files and folders that are there whole or not at all: written beside their place, then moved."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

STALE = 24 * 3600.0  # seconds without a write, after which nobody is at work in a folder any more


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write a file or a folder at; after the block it stands at ``path``, and replaces a file there.

    An error within the block leaves what was there; a full disk is an ``OSError`` with the path, whoever wrote. Whoever
    could read a file that the program opens itself can read this one: safetensors and ``mkstemp`` write for the owner
    alone. A link at ``path`` stays: what it leads to is replaced. When the block has ended, the file is on the disk and
    not only in the system's memory.

    Args:
        path: its folder is made where it is missing.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> with replacing(folder / "words.txt") as new:
        ...     new.write_text("all of it")
        9
        >>> [file.name for file in folder.iterdir()]
        ['words.txt']
    """
    path = Path(path).resolve()
    missing = sum(not folder.exists() for folder in path.parents)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        _sweep(path, beside)
        new = beside / path.name
        yield new
        (beside / "mode").touch()
        mode = (beside / "mode").stat().st_mode
        for file in [new, *new.rglob("*")]:
            if file.is_file():
                file.chmod(mode)
            sync(file)  # a rename may reach the disk before the data does
        os.replace(new, path)
        for folder in path.parents[: missing + 1]:  # the name of a folder that was made lies in the one above it
            sync(folder)
    except SafetensorError as error:  # which has the system's number in its words
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(code := int(number[1]), os.strerror(code), os.fspath(path)) from error
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error  # a write knows no name
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk; on Windows a folder cannot be."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(path: Path, beside: Path) -> None:
    """Delete what writers of ``path`` that were killed have left beside it.

    A folder in which anything has changed within a day is taken for that of a writer who is at work: a process cannot
    be asked, it may be another machine's. Both times are of one file system, so that no clock is compared with another.
    """
    now = beside.stat().st_mtime
    ours = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}")  # as mkdtemp calls them
    for left in path.parent.iterdir():
        if ours.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
            try:
                if now - max(each.lstat().st_mtime for each in (left, *left.rglob("*"))) > STALE:
                    shutil.rmtree(left, ignore_errors=True)
            except FileNotFoundError:  # its writer is done
                continue
