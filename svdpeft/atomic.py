"""Files and folders that are there whole or not at all: written beside their place, then moved."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write a file or a folder at; after the block it stands at ``path``, and replaces a file there.

    An error within the block leaves what was there. Whoever could read a file that the program opens itself can read
    this one: safetensors and ``mkstemp`` write for the owner alone.

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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new = beside / path.name
        yield new
        (beside / "mode").touch()
        mode = (beside / "mode").stat().st_mode
        for file in [f for f in new.rglob("*") if f.is_file()] if new.is_dir() else [new]:
            file.chmod(mode)
            with file.open("rb") as handle:  # a rename may reach the disk before the data does
                os.fsync(handle.fileno())
        os.replace(new, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
