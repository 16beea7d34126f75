"""The cache folder: a folder in it is either complete or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import platformdirs
from filelock import FileLock
from safetensors import SafetensorError

from svdpeft.atomic import replacing


class AssetError(RuntimeError):
    """A model or a data set could not be brought here; the message says what, where, and what to do."""


def root() -> Path:
    """The cache folder: ``$SVDPEFT_CACHE`` where it is set, else the platform's own place for caches."""
    chosen = os.environ.get("SVDPEFT_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("svdpeft", appauthor=False)


def once(name: str, fill: Callable[[Path], None]) -> Path:
    """Make the folder ``root() / name`` once, however many processes ask for it at the same time.

    ``fill`` writes into a folder beside it, which takes the final name by one rename when all is on the disk.
    A process that dies before that leaves nothing that a later one would read.

    Args:
        name: name of the folder inside the cache.
        fill: writes the contents into the empty folder that it is given.

    Returns:
        The complete folder.

    Raises:
        AssetError: the disk is full, or the cache folder cannot be written.

    Example:
        >>> once("greeting", lambda folder: (folder / "hello.txt").write_text("hello"))  # doctest: +SKIP
        PosixPath('/home/me/.cache/svdpeft/greeting')
    """
    target = root() / name
    if target.exists():  # read-only caches work too: nothing is locked or written once the folder is there
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f"{name}.lock")):
            if not target.exists():
                _fill(target, fill)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:  # a library's own message, not one of the system
            raise
        advice = "free some space there, or set SVDPEFT_CACHE to another folder"
        raise AssetError(f"{name!r} could not be written to the cache {target.parent}: {error}; {advice}") from error
    return target


def _fill(target: Path, fill: Callable[[Path], None]) -> None:
    for left in target.parent.glob(f".{target.name}.*"):  # we hold the lock, so its writer was killed
        shutil.rmtree(left, ignore_errors=True)
    with replacing(target) as new:
        new.mkdir()
        fill(new)
