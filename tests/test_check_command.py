"""``svdpeft check``: bits that turned are found, in adapters and in caches, and told with the exit code 1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import svdpeft
from svdpeft.cli import app


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter in ``a``, and the cache that it was started from in ``svd``."""
    monkeypatch.chdir(tmp_path)
    with svdpeft.svd_cache("svd"):
        svdpeft.attach(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5)), svdpeft.PiSSA(rank=2), ["0", "1"]).save("a")
    return tmp_path


def told(*paths: str, code: int = 0) -> list[str]:
    result = CliRunner().invoke(app, ["check", *paths])
    assert result.exit_code == code, result.output
    return result.stdout.splitlines()


def turn(file: Path) -> None:
    """The last bit of the last value."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_what_is_as_it_was_written(kept: Path):
    adapter, cache = told("a", "svd")
    assert adapter == f"a: adapter 'default', 2 sites, {len(load_file('a/adapter.safetensors'))} tensors, as written"
    assert cache == "svd: 2 decompositions, as written"
    assert told("a/adapter.safetensors")[0].startswith("a/adapter.safetensors: adapter 'default'")


def test_a_bit_that_turned(kept: Path):
    turn(kept / "a" / "adapter.safetensors")
    file = min((kept / "svd").glob("*.safetensors"))
    turn(file)
    adapter, cache = told("a", "svd", code=1)
    assert "a is not as it was written: the values of" in adapter
    assert cache == f"svd: {file.name}: its digests differ"
    result = CliRunner().invoke(app, ["check", "a", "--json"])
    assert result.exit_code == 1
    (row,) = json.loads(result.stdout)
    assert (row["path"], row["whole"]) == ("a", False)


@pytest.mark.parametrize("what", ["nothing", "a file", "a link to nothing", "an empty folder", "half of one"])
def test_what_is_none(what: str, kept: Path):
    path = kept / "x"
    if what == "a file":
        path.write_text("{}")
    elif what == "a link to nothing":
        path.symlink_to(kept / "y")
    elif what == "an empty folder":
        path.mkdir()
    elif what == "half of one":
        path.mkdir()
        data = (kept / "a" / "adapter.safetensors").read_bytes()
        (path / "adapter.safetensors").write_bytes(data[: len(data) // 2])
    (line,) = told("x", code=1)
    assert line.startswith("x: x")


def test_a_model_is_told_to_be_one(kept: Path):
    (kept / "x").mkdir()
    (kept / "x" / "config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, kept / "x" / "model.safetensors")
    (line,) = told("x", code=1)
    assert line.startswith("x: a model, with whose tensors no digests were written")
