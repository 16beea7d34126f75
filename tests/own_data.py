"""What the tests of training on own data share: small models in folders, files of rows, and the command."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_language import llama, small_tokenizer
from torch import Tensor
from transformers import BertConfig, BertModel
from typer.testing import CliRunner, Result

from svdpeft.cli import app
from svdpeft.finetuning.order import read_order
from svdpeft.finetuning.train import Training

PAIRS = [{"prompt": f"What is {i} and 1?", "answer": f" It is {i + 1}."} for i in range(33)]
REVIEWS = [{"text": f"{('bad', 'good')[i % 2]} is number {i}", "label": ("neg", "pos")[i % 2]} for i in range(24)]
USUAL = {"model": "tiny", "data": "own.jsonl", "method": "sorsa:rank=4", "lr": 1e-2, "out": "out"}


def write_models(folder: Path) -> None:
    """A Llama and a BERT of two layers, with a tokenizer, in transformers' layout."""
    tokenizer = small_tokenizer()
    llama(tokenizer, torch.float32).save_pretrained(folder / "tiny")
    torch.default_generator.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes["initializer_range"] = 0.4  # so that texts are told apart
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes, max_position_embeddings=64)).save_pretrained(
        folder / "bert"
    )
    for name in ("tiny", "bert"):
        tokenizer.save_pretrained(folder / name)


def jsonl(path: str | Path, rows: Sequence[Any]) -> None:
    Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def table(path: str | Path, rows: Sequence[Mapping[str, Any]], delimiter: str = ",") -> None:
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def training(resume: bool = False, **options: Any) -> Training:
    """A training, made ready: the usual one but for these options."""
    order = read_order(None, {k: v for k, v in {**USUAL, **options}.items() if v is not None})
    return Training.of(order, resume)


def words(**options: Any) -> list[str]:
    """The words of the command for these options."""
    found = []
    for name, value in {**USUAL, **options}.items():
        for each in value if isinstance(value, list) else [value]:
            if each is not None:
                found += [f"--{name.replace('_', '-')}"] + ([str(each)] if each is not True else [])
    return found


def command(*more: str, code: int = 0, **options: Any) -> Result:
    """``svdpeft train``, as it is typed."""
    result = CliRunner().invoke(app, ["train", *more, *words(**options)])
    assert result.exit_code == code, result.output
    return result


def weights(folder: str | Path = "out") -> dict[str, Tensor]:
    return load_file(Path(folder, "adapter.safetensors"))


def record(folder: str | Path = "out") -> dict[str, Any]:
    return json.loads(Path(folder, "training.json").read_text())


def assert_equal_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture
def place(saved_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the models and two files of rows in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "bert"):
        Path(name).symlink_to(saved_models / name)
    jsonl("own.jsonl", PAIRS)
    table("reviews.csv", REVIEWS)
    return tmp_path
