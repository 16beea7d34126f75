"""``svdpeft export``, ``import``, ``combine`` and ``merge`` on the models that they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import perturb
from tiny_language import llama, small_tokenizer
from torch import Tensor
from typer.testing import CliRunner

import svdpeft
from svdpeft import DoRA, LoRA, PiSSA, models
from svdpeft.cli import app

IDS = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder ``tiny`` with a model, and adapters ``math`` and ``code`` of it."""
    monkeypatch.chdir(tmp_path)
    tokenizer = small_tokenizer()
    llama(tokenizer, torch.float32).save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    for seed, (name, method) in enumerate((("math", PiSSA(rank=2)), ("code", LoRA(rank=3)))):
        adapter = svdpeft.attach(models.load("tiny").model, method, ["q_proj", "v_proj"], name=name)
        perturb(adapter, seed=seed)
        adapter.save(name)
    return tmp_path


def run(*words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def adapted(*folders: str) -> Tensor:
    model = models.load("tiny").model
    for i, folder in enumerate(folders):
        svdpeft.load(model, folder, name=f"a{i}")
    return logits(model)


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_to_peft_and_back(world: Path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    found = json.loads(run("export", "math", "lora", "--base", "tiny", "--json").stdout)
    assert set(found["ranks"].values()) == {4}  # L and A of PiSSA have moved: twice its rank
    theirs = peft.PeftModel.from_pretrained(models.load("tiny").model, "lora").eval()
    near(logits(theirs), adapted("math"))
    told = json.loads(run("import", "lora", "again", "--base", "tiny", "--json").stdout)
    assert told["sites"] == len(found["ranks"])
    near(adapted("again"), adapted("math"))
    assert "at most" in run("export", "math", "small", "--base", "tiny", "--max-rank", "1").output


def test_to_llama_cpp(world: Path):
    found = json.loads(run("export", "code", "code.gguf", "--to", "gguf", "--base", "tiny", "--json").stdout)
    assert set(found["ranks"].values()) == {3}
    assert Path("code.gguf").stat().st_size > 0


def test_the_model_is_what_the_training_says(world: Path):
    Path("math/training.json").write_text(json.dumps({"settings": {"model": "tiny"}}))
    run("export", "math", "lora")
    assert "give --base" in run("export", "code", "other", code=2).stderr


def test_combined(world: Path):
    found = json.loads(run("combine", "math:1", "code", "both", "--base", "tiny", "--json").stdout)
    assert max(found["lost"].values()) < 1e-6
    near(adapted("both"), adapted("math", "code"))
    assert "of an update is lost" in run("combine", "math", "code", "one", "--base", "tiny", "--rank", "1").output
    for how in ("ties", "dare"):
        run("combine", "math:0.5", "code:0.5", how, "--base", "tiny", "--how", how, "--density", "0.5")
        assert not torch.allclose(adapted(how), adapted("both"))


def test_merged(world: Path):
    run("merge", "tiny", "math", "merged")
    near(logits(models.load("merged").model), adapted("math"))
    assert (
        "does not exist; nor is it hf:NAME or an embedded model: did you mean 'smollm2-135m'"
        in run("merge", "smollm2-135", "math", "other", code=2).stderr
    )


REFUSED = [
    (["export", "nowhere", "out", "--base", "tiny"], "nowhere is not an adapter folder"),
    (["export", "math", "tiny", "--base", "tiny"], "tiny exists: an export does not overwrite"),
    (["export", "math", "out", "--base", "tinny"], "no model is called 'tinny'"),
    (["export", "dora", "out", "--base", "tiny"], "merge"),
    (["import", "math", "out", "--base", "tiny"], "math"),
    (["import", "nowhere", "out", "--base", "tiny"], "nowhere"),
    (["import", "math", "tiny", "--base", "tiny"], "tiny exists: nothing is overwritten"),
    (["combine", "math:x", "out", "--base", "tiny"], "'x' is no number"),
    (["combine", "math", "math", "tiny", "--base", "tiny"], "tiny exists: nothing is overwritten"),
    (["combine", "math", "nowhere", "out", "--base", "tiny"], "nowhere is not an adapter folder"),
    (["combine", "math:inf", "out", "--base", "tiny"], "is not finite"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[" ".join(words[:3]) + " " + m for words, m in REFUSED])
def test_what_is_refused(world: Path, words: list[str], message: str):
    if "dora" in words:
        adapter = svdpeft.attach(models.load("tiny").model, DoRA(LoRA(2)), ["q_proj"])
        perturb(adapter)
        adapter.save("dora")
    before = sorted(path.name for path in Path().iterdir())
    assert message in run(*words, code=2).stderr
    assert sorted(path.name for path in Path().iterdir()) == before
