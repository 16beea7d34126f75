"""``svdpeft merge``, ``extract`` and ``decompose``: what they print, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from folder_models import contents, llama, moved, saved
from torture.kills import no_room
from typer.testing import CliRunner

import svdpeft
from svdpeft import LoRA
from svdpeft.cli import app
from svdpeft.folders import merge

Q = "model.layers.0.self_attn.q_proj"


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, two adapters for it, and the base with both."""
    monkeypatch.chdir(tmp_path)
    saved(llama(), Path("base"))
    for name in ("a", "b"):
        moved(llama(), LoRA(rank=2), name=name, targets=["q_proj"]).save(name)
    merge("base", ["a", "b"], "tuned")
    return tmp_path


def test_merge(ready: Path):
    said = run("merge", "base", "a:0.5", "b", "out")
    assert said.exit_code == 0, said.output
    assert "out: merged 1 sites" in said.stdout
    merge("base", [("a", 0.5), "b"], "expected")
    assert contents(ready / "out") == contents(ready / "expected")
    options = ["--dtype", "float16", "--stochastic-rounding", "--seed", "3", "--shard-size", "1GB", "--json"]
    told = json.loads(run("merge", "base", "a", "half", *options).stdout)
    assert told["out"] == "half"
    assert 0 < told["lost"][Q] < 0.1
    merge("base", "a", "alike", dtype=torch.float16, stochastic_rounding=True, seed=3, shard_size="1GB")
    assert contents(ready / "half") == contents(ready / "alike")
    Path("a").rename("c:2")  # a folder of that name goes before a weight
    assert run("merge", "base", "c:2", "colon").exit_code == 0
    merge("base", "c:2", "no-colon")
    assert contents(ready / "colon") == contents(ready / "no-colon")


def test_merge_into_another_base(ready: Path):
    other = llama()
    with torch.no_grad():
        other.get_parameter(f"{Q}.weight").add_(1)
    saved(other, Path("other"))
    said = run("merge", "other", "a", "out")
    assert said.exit_code == 2
    assert "another base" in said.stderr
    assert run("merge", "other", "a", "out", "--no-check-base").exit_code == 0


def test_extract(ready: Path):
    said = run("extract", "base", "tuned", "out", "--rank", "4")
    assert said.exit_code == 0, said.output
    assert Q in said.stdout
    assert "1 sites of rank 4" in said.stdout
    told = json.loads(run("extract", "base", "tuned", "named", "--energy", "0.5", "--name", "mine", "--json").stdout)
    assert 1 <= told["ranks"][Q] <= 4
    assert 0 < told["errors"][Q] <= 0.5**0.5
    assert told["whole"] == []
    assert svdpeft.load(llama(), "named").name == "mine"


def test_decompose(ready: Path):
    said = run("decompose", "base", "--rank", "2", "--cache", "svd", "--targets", "q_proj", "--targets", "k_proj")
    assert said.exit_code == 0, said.output
    assert "svd: 2 sites: 2 decomposed" in said.stdout
    told = json.loads(run("decompose", "base", "--rank", "2", "--cache", "svd", "--json").stdout)
    assert len(told["sites"]) == 7
    assert len(told["computed"]) == 5


def test_a_decomposition_that_is_stopped_says_how_to_go_on(ready: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("svdpeft.folders.decompose", stop)
    said = run("decompose", "base", "--rank", "2", "--cache", "svd")
    assert said.exit_code == 130
    assert "the same command goes on" in said.stdout


BAD = {
    "merge base nowhere out": "nowhere is not an adapter folder",
    "merge nowhere a out": "nowhere does not exist",
    "merge base a:much out": "'much' is no number",
    "merge base a b tuned": "tuned exists",
    "merge base a out --shard-size big": "ig",
    "extract base tuned out": "give one of rank and energy",
    "extract base tuned out --rank 2 --energy 0.5": "give one of rank and energy",
    "extract base tuned out --rank 2 --targets q_prj": "did you mean 'q_proj'",
    "extract base base out --rank 2": "no difference",
    "decompose nowhere --rank 2 --cache svd": "nowhere does not exist",
    "decompose base --rank 0 --cache svd": "rank 0",
    "decompose base --rank 2 --cache svd --targets q_prj": "did you mean 'q_proj'",
}


@pytest.mark.parametrize("words", BAD)
def test_a_mistake_is_told_in_a_line(words: str, ready: Path):
    said = run(*words.split())
    assert said.exit_code == 2
    assert said.stdout == ""
    assert said.stderr.startswith("svdpeft: ")
    assert BAD[words] in said.stderr
    assert said.stderr.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize("command", ["merge", "extract", "decompose"])
def test_help_has_an_example(command: str):
    said = run(command, "--help")
    assert said.exit_code == 0
    assert f"Example: svdpeft {command} llama" in " ".join(said.stdout.split())


@pytest.mark.parametrize(
    "words",
    [
        "merge base a out",
        "export a out --base base",
        "export a out.gguf --to gguf --base base",
        "extract base tuned out --rank 1",
        "decompose base --rank 2 --cache out",
    ],
)
def test_a_full_disk_is_told_in_a_line(words: str, ready: Path):
    """Whoever writes: Python, safetensors or numpy. Nothing is left, and nothing is said to be there."""
    pytest.importorskip("resource")
    with no_room():
        found = run(*words.split())
    assert found.exit_code == 2, found.output
    assert "File too large" in found.output
    assert "out" in found.output
    assert not [file for file in Path().rglob("*") if file.is_file() and "out" in str(file) and file.suffix != ".lock"]


def test_an_extract_of_a_name_that_no_adapter_can_have(ready: Path):
    for name in ("", "a.b"):
        found = run("extract", "base", "tuned", "out", "--rank", "1", "--name", name)
        assert found.exit_code == 2
        assert f"adapter name {name!r}" in found.output
    assert not Path("out").exists()
