"""A folder of decompositions: what was computed once is read from then on, by every method and in every process.

A file is named by a hash of the very matrix, the driver and its settings, the kind of device and the version of torch.
A hit has the bits of the first computation; a new one with another number of threads, or on another processor, may
differ from them by rounding. An exact driver's file holds the full thin SVD, of which each method takes the rank that
it wants.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from svdpeft.atomic import replacing
from svdpeft.decomposition.digests import digest
from svdpeft.decomposition.processes import one_at_a_time, processes

DIGESTS = "digests"  # in a file's metadata: that of each tensor


class _Cache(NamedTuple):
    folder: Path
    required: bool


_CACHE: ContextVar[_Cache | None] = ContextVar("svd_cache", default=None)


@contextmanager
def svd_cache(folder: str | os.PathLike[str], required: bool = False) -> Iterator[Path]:
    """Keep every SVD that is computed inside the block in ``folder``, and read what is there already.

    Attaching then costs a hash of each weight and the reading of its factors, where it cost an SVD. On the disk a
    matrix (m, n) takes min(m, n) (m + n + 1) numbers where the exact driver decomposed it, r (m + n + 1) where the
    randomized one did. Several processes may share a folder; nothing is ever deleted from it. Processes that a launcher
    has started together decompose no weight twice: each begins with another share, and reads what others have.

    Args:
        folder: made if need be.
        required: what cannot be written, on a full disk, is an error; else it costs a warning, and the SVD again.

    Yields:
        The folder.

    Raises:
        OSError: the folder cannot be made, or, where that is required, written.

    Example:
        >>> with svd_cache("/tmp/svdpeft-svd"):  # doctest: +SKIP
        ...     adapter = svdpeft.attach(model, svdpeft.SORSA(rank=16))
    """
    path = Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    token = _CACHE.set(_Cache(path, required))
    try:
        yield path
    finally:
        _CACHE.reset(token)


@contextmanager
def svd_cache_until_attached(folder: str | os.PathLike[str]) -> Iterator[None]:
    """``svd_cache`` for processes that were started together and all attach the same: the last one deletes it.

    Args:
        folder: that all of them can reach, and that nobody else has.
    """
    me, together = processes()
    with svd_cache(folder) as path:
        try:
            yield
        finally:
            (path / f"{me}.done").touch()
            if len(list(path.glob("*.done"))) == together:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def uncached() -> Iterator[None]:
    """Neither read nor keep SVDs inside the block: for matrices that will not come again, such as weights in training.

    Example:
        >>> with svd_cache("/tmp/svdpeft-svd"), uncached():  # doctest: +SKIP
        ...     now = truncated_svd(w + change)
    """
    token = _CACHE.set(None)
    try:
        yield
    finally:
        _CACHE.reset(token)


def remembered(
    w: Tensor, how: str, rank: int, compute: Callable[[], tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first ``rank`` triplets that ``compute`` gives, from the cache where one is open and has them.

    Args:
        w: what is decomposed, (*b, m, n).
        how: the driver and its settings.
        rank: number of triplets wanted.
        compute: gives at least ``rank`` triplets ``u`` (*b, m, k), ``s`` (*b, k), ``vh`` (*b, k, n).
    """
    if (cache := _CACHE.get()) is None:
        return _first(rank, *compute())
    # Another kind of device or another torch rounds differently: it has its own file.
    file = cache.folder / f"{digest(w)}-{how}-{w.device.type}-torch{torch.__version__.partition('+')[0]}.safetensors"
    if (known := _read(file, rank, w.device)) is not None:
        return known
    with one_at_a_time(file):
        if (known := _read(file, rank, w.device)) is not None:  # by now, from the process that was at it
            return known
        found = compute()
        _write(file, cache.required, *found)
    return _first(rank, *found)


def _first(rank: int, u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return u[..., :rank], s[..., :rank], vh[..., :rank, :]


def _read(file: Path, rank: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor] | None:
    """The first triplets of a file; ``None`` where it is not there or, with a warning, damaged: it is written again."""
    try:
        found = _held(file)
    except (OSError, SafetensorError, RuntimeError) as error:
        if file.exists():  # and was not deleted by another process while safe_open, which opens it twice, was at it
            warnings.warn(f"{file} is damaged, and is computed again: {error}", RuntimeWarning, stacklevel=3)
        return None
    # Copies: a view would keep all of the file.
    u, s, vh = (t.clone(memory_format=torch.contiguous_format).to(device) for t in _first(rank, *found))
    return u, s, vh


def _held(file: Path) -> list[Tensor]:
    with safe_open(file, "pt") as held:
        found = [held.get_tensor(name) for name in ("u", "s", "vh")]
        known = (held.metadata() or {}).get(DIGESTS)
    if known != _digests(found):
        raise RuntimeError("its digests differ")
    return found


def damaged(folder: Path) -> dict[str, str]:
    """The files of a cache: the name of each -> what is wrong with it, "" where its bits are those that were written.

    Args:
        folder: of the cache.
    """
    wrong = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            _held(file)
            wrong[file.name] = ""
        except (OSError, SafetensorError, RuntimeError) as error:
            wrong[file.name] = str(error)
    return wrong


def _write(file: Path, required: bool, u: Tensor, s: Tensor, vh: Tensor) -> None:
    try:
        with replacing(file) as new:  # a reader finds a whole file or none
            found = [t.contiguous().cpu() for t in (u, s, vh)]
            save_file({"u": found[0], "s": found[1], "vh": found[2]}, new, metadata={DIGESTS: _digests(found)})
    except (OSError, SafetensorError) as error:
        told = f"an SVD could not be kept in {file.parent}: {error}"
        if required:
            raise OSError(told) from error
        warnings.warn(told, RuntimeWarning, stacklevel=2)


def _digests(tensors: Sequence[Tensor]) -> str:
    return " ".join(map(digest, tensors))
