"""What is saved survives a disk that loses what was not synced: the old or the new is found at each moment of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from power_cut import Recorder
from torture.saving import adapter_of, base, number_in

from svdpeft import CheckpointError, atomic
from svdpeft.adapter.file import TENSORS
from svdpeft.atomic import replacing

CUTS = 20  # per moment, of what each name and file may have come to


def text(folder: Path, number: int) -> None:
    with replacing(folder / "deep" / "er" / "words.txt") as new:
        new.write_text(f"{number}" * 64)


def text_in(folder: Path) -> int | None:
    try:
        (number,) = set((folder / "deep" / "er" / "words.txt").read_text())
    except FileNotFoundError:
        return None
    return int(number)


def tree(folder: Path, number: int) -> None:
    """A folder never takes the place of another one."""
    with replacing(folder / f"model {number}") as new:
        (new / "sub").mkdir(parents=True)
        for name in ("config", "sub/weights"):
            (new / name).write_text(f"{number}" * 64)


def tree_in(folder: Path) -> int | None:
    there = sorted(path for path in folder.iterdir() if path.name.startswith("model "))
    for path in there:
        assert {(path / name).read_text() for name in ("config", "sub/weights")} == {path.name[-1] * 64}
    return int(there[-1].name[-1]) if there else None


def adapter(folder: Path, number: int) -> None:
    adapter_of(base(), number).save(folder / "adapter")


def adapter_in(folder: Path) -> int | None:
    return number_in(folder / "adapter") if (folder / "adapter" / TENSORS).exists() else None


@pytest.mark.parametrize(("write", "read"), [(text, text_in), (tree, tree_in), (adapter, adapter_in)])
def test_a_power_cut_leaves_the_old_or_the_new(write: Callable, read: Callable, tmp_path: Path):
    disk, draw = tmp_path / "disk", random.Random(0)
    disk.mkdir()
    for number, before in ((1, None), (2, 1)):
        recorder, found = Recorder(disk), set()
        with recorder.watching():
            write(disk, number)
        for place, moment in enumerate(recorder.moments):
            for cut in range(CUTS):
                after = tmp_path / f"{number} {place} {cut}"
                moment.after_a_cut(after, draw)
                found.add(read(after))
                if moment is recorder.moments[-1]:
                    assert read(after) == number, "a save that has returned"
        assert found == {before, number}


@pytest.mark.parametrize("kept", ["files", "folders"])
def test_without_a_sync_it_would_not(kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """That the disk of these tests does lose what it may."""
    real = atomic.sync
    monkeypatch.setattr(atomic, "sync", lambda path: real(path) if path.is_dir() == (kept == "folders") else None)
    with pytest.raises((AssertionError, CheckpointError, ValueError)):
        test_a_power_cut_leaves_the_old_or_the_new(text, text_in, tmp_path)
