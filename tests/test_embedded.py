"""The table of embedded assets, on a small wheel made here: pip's real path, no network."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from safetensors import SafetensorError

from svdpeft.models import cache, embedded
from svdpeft.models.embedded import Asset, AssetError

DATA = bytes(range(256)) * 64
# Two of these race: each says when it is ready, waits for the word, fetches, and notes every run of pip.
RACER = """
import pathlib, sys, time
from svdpeft.models import embedded
here, sha, me = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
member = "tiny_asset/data/numbers.bin"
embedded.ASSETS["tiny"] = embedded.Asset("tiny", "tiny-asset==1.2", sha, member, "numbers")
download = embedded._download
def noted(asset, folder):
    with (here / "downloads").open("a") as file:
        file.write(me + "\\n")
    return download(asset, folder)
embedded._download = noted
(here / f"ready-{me}").touch()
while not (here / "go").exists():
    time.sleep(0.01)
print(embedded.fetch("tiny"))
"""
# Dies while it writes, as by a lost power supply: no clean-up runs.
VICTIM = """
import os
from svdpeft.models import cache
def fill(folder):
    (folder / "half.bin").write_bytes(b"half")
    os._exit(9)
cache.once("victim", fill)
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """An asset in a wheel that pip finds in a folder; the wheel's code would leave a mark if it ran."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tiny_asset-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_asset/__init__.py", f"open({str(tmp_path / 'ran')!r}, 'w').close()")
        archive.writestr("tiny_asset/data/", "")
        archive.writestr("tiny_asset/data/numbers.bin", DATA)
        archive.writestr("tiny_asset/data/deep/more.txt", "more")
        info = "tiny_asset-1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("SVDPEFT_CACHE", str(tmp_path / "cache"))
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    asset = Asset("tiny", "tiny-asset==1.2", sha256, "tiny_asset/data/numbers.bin", "numbers")
    monkeypatch.setitem(embedded.ASSETS, "tiny", asset)
    return asset


def hidden_files(folder: Path) -> list[Path]:
    return list(folder.glob(".*"))


def test_table_is_well_formed() -> None:
    for asset in embedded.assets():
        assert len(asset.sha256) == 64
        assert set(asset.sha256) <= set("0123456789abcdef")
        assert asset.requirement.count("==") == 1
        assert embedded.get(asset.name) is asset
        assert asset.wheel.endswith("-*.whl")


def test_fetched_once_and_code_never_imported(tiny: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not embedded.available("tiny")
    path = embedded.fetch("tiny")
    assert path.name == "numbers.bin"
    assert path.read_bytes() == DATA
    assert embedded.available("tiny")
    monkeypatch.setattr(embedded.subprocess, "run", None)  # a second run of pip would fail
    assert embedded.fetch("tiny") == path
    assert [file.name for file in path.parent.iterdir()] == ["numbers.bin"]  # nothing but the data was taken
    assert "tiny_asset" not in sys.modules
    assert not (tmp_path / "ran").exists()


def test_a_whole_folder(tiny: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Asset("tiny", tiny.requirement, tiny.sha256, "tiny_asset/data/", "folder")
    monkeypatch.setitem(embedded.ASSETS, "tiny", folder)
    path = embedded.fetch("tiny")
    assert path.name == "data"
    assert (path / "numbers.bin").read_bytes() == DATA
    assert (path / "deep" / "more.txt").read_text() == "more"


def test_wheel_put_there_by_hand(tiny: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "cache" / "wheels"
    wheels.mkdir(parents=True)
    (tmp_path / "index" / "tiny_asset-1.2-py3-none-any.whl").rename(wheels / "tiny_asset-1.2-py3-none-any.whl")
    monkeypatch.setattr(embedded.subprocess, "run", None)
    assert embedded.fetch("tiny").read_bytes() == DATA


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="no asset is called 'mnist5': did you mean 'mnist5k'"):
        embedded.fetch("mnist5")


def test_wrong_checksum(tiny: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "0" * 64
    other = Asset("tiny", tiny.requirement, expected, tiny.member, tiny.about)
    monkeypatch.setitem(embedded.ASSETS, "tiny", other)
    with pytest.raises(AssetError, match=f"SHA-256 {tiny.sha256}, expected {expected}: it is not used"):
        embedded.fetch("tiny")
    assert not embedded.available("tiny")
    assert not hidden_files(tmp_path / "cache")


def test_no_network(tiny: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    with pytest.raises(AssetError) as caught:
        embedded.fetch("tiny")
    message = str(caught.value)
    assert "'tiny' (tiny-asset==1.2) could not be downloaded" in message
    assert f"put the wheel tiny_asset-1.2-*.whl into {tmp_path / 'cache' / 'wheels'} by hand" in message
    assert not embedded.available("tiny")


def test_disk_full_then_space_again(tiny: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(AssetError, match=r"could not be written to the cache .*No space left.*SVDPEFT_CACHE"):
            embedded.fetch("tiny")
    assert not embedded.available("tiny")
    assert not hidden_files(tmp_path / "cache")
    assert embedded.fetch("tiny").read_bytes() == DATA


def test_errors_while_filling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDPEFT_CACHE", str(tmp_path))

    def raising(error: Exception) -> None:
        def fill(folder: Path) -> None:
            raise error

        cache.once("broken", fill)

    with pytest.raises(AssetError, match="SVDPEFT_CACHE"):
        raising(SafetensorError("I/O error: No space left on device (os error 28)"))
    with pytest.raises(OSError, match=r"^a library's own words$"):
        raising(OSError("a library's own words"))
    assert [path.name for path in tmp_path.iterdir()] == ["broken.lock"]


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SVDPEFT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match="set SVDPEFT_CACHE to another folder"):
        cache.once("anything", lambda folder: None)


def test_half_written_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDPEFT_CACHE", str(tmp_path))
    killed = subprocess.run([sys.executable, "-c", VICTIM], check=False)
    assert killed.returncode == 9
    assert not (tmp_path / "victim").exists()
    assert len(hidden_files(tmp_path)) == 1  # the half is there, hidden

    def whole(folder: Path) -> None:
        (folder / "whole.bin").write_bytes(DATA)

    folder = cache.once("victim", whole)
    assert [file.name for file in folder.iterdir()] == ["whole.bin"]
    assert not hidden_files(tmp_path)  # and swept


def test_two_processes_at_once(tiny: Asset, tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path), tiny.sha256, me], stdout=subprocess.PIPE, text=True
        )
        for me in ("one", "two")
    ]
    while not all((tmp_path / f"ready-{me}").exists() for me in ("one", "two")):
        assert all(racer.poll() is None for racer in racers)
        time.sleep(0.01)
    (tmp_path / "go").touch()
    paths = {racer.communicate(timeout=60)[0].strip() for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0]
    (path,) = paths
    assert Path(path).read_bytes() == DATA
    assert len((tmp_path / "downloads").read_text().split()) == 1
