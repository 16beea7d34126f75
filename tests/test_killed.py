"""Saves that are killed, beside each other, or beside a reader: there is always one whole adapter of those saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import LIGHT
from torture.saving import adapter_of, base, number_in

from svdpeft import atomic
from svdpeft.adapter.file import TENSORS
from svdpeft.atomic import STALE, replacing


def run(program: str, *arguments: object) -> None:
    """One of the programs of ``make torture``."""
    file = Path(__file__).parent / "torture" / f"{program}.py"
    environment = os.environ | {"PYTHONPATH": f"{LIGHT}{os.pathsep}{file.parents[2]}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(file), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_saves_that_are_killed_or_beside_each_other(tmp_path: Path):
    """8 at drawn moments; ``make torture`` has hundreds."""
    run("saving", tmp_path, 8)


def test_a_reader_that_sees_another_file_in_the_middle_reads_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """safetensors opens a file twice: here the other save comes in between, once."""
    from svdpeft.adapter import file

    adapter_of(base(), 1).save(tmp_path / "a")
    adapter_of(base(), 2).save(tmp_path / "b")
    opened, real = [], file.safe_open

    def between(*args: object) -> object:
        found = real(*args)
        opened.append(args)
        if len(opened) == 1:
            os.replace(tmp_path / "b" / TENSORS, tmp_path / "a" / TENSORS)
        return found

    monkeypatch.setattr(file, "safe_open", between)
    assert number_in(tmp_path / "a") == 2
    assert len(opened) == 2


def test_what_a_killed_save_left_is_swept_and_nothing_else(tmp_path: Path):
    """Ours by its name, and a day old by the clock of the disk."""
    path = tmp_path / "words.txt"
    folders = {name: tmp_path / name for name in (".words.txt.abcd_123", ".words.txt.abcd_124", ".words.txt.mine.old")}
    for folder in folders.values():
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "words.txt").write_text("half")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".words.txt.abcd_125").symlink_to("elsewhere")
    (tmp_path / ".words.txt.abcd_126").write_text("a file")
    now = tmp_path.stat().st_mtime
    for name in (".words.txt.abcd_123", ".words.txt.mine.old", "elsewhere", ".words.txt.abcd_126"):
        for each in (*(tmp_path / name).rglob("*"), tmp_path / name):
            os.utime(each, (now - STALE - 60,) * 2)
    young = folders[".words.txt.abcd_124"]  # its writer is at work in it: the folder is old, a file is not
    os.utime(young, (now - STALE - 60,) * 2)
    with replacing(path) as new:
        new.write_text("all")
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {
        *("words.txt", "elsewhere", young.name, ".words.txt.mine.old"),
        *(".words.txt.abcd_125", ".words.txt.abcd_126"),
    }


def test_a_link_stays_and_is_written_through(tmp_path: Path):
    for name in ("real", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("real")
    adapter_of(base(), 1).save(tmp_path / "link")
    assert number_in(tmp_path / "real") == 1
    (tmp_path / "real" / TENSORS).rename(tmp_path / "other" / "blob")
    (tmp_path / "real" / TENSORS).symlink_to(Path("..", "other", "blob"))
    adapter_of(base(), 2).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / TENSORS).is_symlink()
    assert not (tmp_path / "other" / "blob").is_symlink()
    assert number_in(tmp_path / "real") == 2
    (tmp_path / "dangling").symlink_to("later")
    adapter_of(base(), 3).save(tmp_path / "dangling")
    assert number_in(tmp_path / "later") == 3
    assert (tmp_path / "dangling").is_symlink()


def test_the_folder_is_on_the_disk_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Files before the rename, the names after it."""
    done, sync, move = [], atomic.sync, os.replace
    monkeypatch.setattr(atomic, "sync", lambda path: done.append(path.name) or sync(path))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("rename") or move(a, b))
    with replacing(tmp_path / "folder") as new:
        new.mkdir()
        (new / "words.txt").write_text("all")
    assert done == ["folder", "words.txt", "rename", tmp_path.name]


def test_every_other_writer_that_is_killed(tmp_path: Path):
    """Twice each, after its check has noticed half of a file; ``make torture`` has 200."""
    run("writers", tmp_path, 2)


def test_comparisons_that_are_killed(tmp_path: Path):
    """One, until it ends; ``make torture`` has two hundred kills, and some of the command with two workers."""
    run("comparing", tmp_path, 1)
