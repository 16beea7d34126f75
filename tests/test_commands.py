"""Every command of the README and of the documentation runs as it is printed, but for what ``INSTEAD`` says.

The pretrained models are cut to one block; a comparison is checked whole, and then trains one of its methods on a few
examples: the way from the words to the result is that of the user.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import own_data
import pytest
import report_records
import rwkv_models
import torch
from PIL import Image
from rows import EVERYTHING
from safetensors import safe_open
from safetensors.torch import save_file
from test_tasks_vision import flowers
from tiny_language import llama, small_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import svdpeft
from svdpeft import LoRA, models
from svdpeft.cli import app
from svdpeft.compare import reading, runner
from svdpeft.compare.reading import read_spec
from svdpeft.finetuning import plan, session, train
from svdpeft.finetuning.order import read_order
from svdpeft.finetuning.words import read_values
from svdpeft.models import language, rwkv, vision
from svdpeft.models.embedded import AssetError
from svdpeft.registry import TASKS
from svdpeft.tasks import humaneval, probes

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(svdpeft [a-z]+ [^`]+)`")
PROSE = re.compile(r"…|NAME|MODEL|--methods$")  # in a sentence: what somebody is to write there

# What is not at hand in a test -> what stands for it.
INSTEAD = {
    "hf:NAME": "hf:tiny",  # a folder in transformers' layout
    "timm:resnet18": "timm:resnet10t",  # smaller, and without the hub's weights
    "s3://bucket": "bucket",  # a folder
    "--backend ray": "",  # tests/test_backends.py has a cluster
    "--workers 2": "--workers 1",  # other processes would not have the small models; tests/test_protocol.py has two
    "hellaswag,arc_easy": "my-task.yaml",  # which the harness would download
    "lambada_openai": "my-task.yaml",
    "root=/data": "root=data",
    "hf:meta-llama/Llama-2-7b-hf": "hf:tiny",  # 7 billion values
    "hf:mistralai/Mistral-7B-v0.1": "hf:tiny",
    "hf:google/gemma-7b": "hf:tiny",
    "examples/shapes/llama-2-7b.json": "tiny/config.json",
    "train_size=100000": "train_size=4",
    "shots=10": "shots=2",
    "--length 512": "--length 256",  # RWKV's plan goes token by token
}
FOLDERS = {"merge", "extract", "decompose"}  # commands on models in folders
ADAPTERS = {"export", "import", "combine"}  # on adapters
FEW = {  # options of a task that make it small; its data where they are not given
    "mnist5k": {"train_size": 20, "validation_size": 10, "test_size": 10},
    "wordproblems": {"train_size": 6, "validation_size": 2, "test_size": 2, "max_new_tokens": 2},
    "gsm8k": {"test_size": 2, "max_new_tokens": 4},
    "math": {"test_size": 2, "max_new_tokens": 4},
    "humaneval": {"test_size": 1, "max_new_tokens": 4},
    "flowers102": {},
    "classification": {},
}


def commands() -> list[str]:
    """Each once, by the first page that has it."""
    found: dict[str, None] = {}
    for page in PAGES:
        text = page.read_text()
        lines = [
            line for language, block in BLOCK.findall(text) if language in ("", "bash") for line in block.split("\n")
        ]
        lines += [span for span in INLINE.findall(text) if not PROSE.search(span)]
        for line in lines:
            if line.startswith("svdpeft "):
                found[shlex.join(shlex.split(line.partition(" > ")[0], comments=True))] = None
    return list(found)


LOAD = models.load
BLOCKS = {"dinov2-vits14": "blocks", "smollm2-135m": "model.layers", "minilm-l6": "encoder.layer"}


@pytest.fixture(scope="module")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """What gives the folder of a language model with the first of its blocks: the others are never read."""
    root, fetch = tmp_path_factory.mktemp("one-block"), dict(language.EMBEDDED)

    def folder(name: str) -> Path:
        source, target = Path(fetch[name](name)), root / name
        if (target / "model.safetensors").is_file():  # made by another command, perhaps apart
            return target
        target.mkdir(exist_ok=True)
        for file in source.iterdir():
            if file.suffix in {".json", ".txt", ".jinja"}:
                shutil.copy(file, target)
        config = json.loads((source / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
        others = re.compile(rf"\b{re.escape(BLOCKS[name])}\.[1-9]")
        with safe_open(source / "model.safetensors", "pt") as whole:
            kept = {key: whole.get_tensor(key) for key in whole.keys() if not others.search(key)}  # noqa: SIM118
        save_file(kept, target / "model.safetensors", {"format": "pt"})
        return target

    yield folder
    seen.cache_clear()


@cache
def seen(name: str, **options: Any) -> models.Loaded:
    """A pretrained vision model, with one of its blocks; what is on the hub alone, without its weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("timm.models._builder.load_pretrained", lambda *args, **kwargs: None)
        loaded = LOAD(name, **options)
    if name in BLOCKS:
        setattr(loaded.model, BLOCKS[name], loaded.model.get_submodule(BLOCKS[name])[:1])
    return loaded


def small(name: str, **options: Any) -> models.Loaded:
    if name not in vision.EMBEDDED and not name.startswith("timm:"):
        return LOAD(name, **options)
    loaded = seen(name, **{key: value for key, value in options.items() if value is not None})
    return dataclasses.replace(loaded, model=copy.deepcopy(loaded.model))


def shortened(*args: Any, **options: Any) -> Any:
    """The specification as the command says it, checked whole; then what of it is trained here."""
    spec = read_spec(*args, **options)
    runner.check(spec)
    known = {field.name for field in dataclasses.fields(TASKS[spec.task])}
    few = {key: value for key, value in FEW[spec.task].items() if key in known}
    return dataclasses.replace(
        spec,
        methods=spec.methods[1:2] if spec.model == "smollm2-135m" else spec.methods[-1:],  # LoRA decomposes nothing
        budgets=spec.budgets[:1],
        baseline=None,
        confidence=None,
        seeds=spec.seeds[:1],
        epochs=min(spec.epochs, 1) if few else 0.15,
        task_options={**spec.task_options, **few},
        search=None,
        batch_size=min(spec.batch_size, 3 if few else 32),
        image_size=spec.image_size if spec.image_size or spec.model in BLOCKS else 32,
        snapshots=1,
    )


def words_of(command: str) -> list[str]:
    for found, instead in INSTEAD.items():
        command = command.replace(found, instead)
    words = shlex.split(command)[1:]
    task = value(words, "--task")
    if words[0] == "eval" and task:
        words += [word for key, few in FEW.get(task, {}).items() for word in ("--option", f"{key}={few}")]
    return words


def value(words: Sequence[str], option: str) -> str | None:
    return words[words.index(option) + 1] if option in words else None


def classes(words: Sequence[str]) -> int | None:
    """Of the new head that the task of a command puts on its model."""
    if value(words, "--num-classes") is not None or value(words, "--task") is None:
        return int(value(words, "--num-classes") or 0) or None
    options = [words[i + 1] for i, word in enumerate(words) if word == "--option"]
    return TASKS.make(str(value(words, "--task")), read_values(options)).num_classes


@pytest.fixture(scope="module")
def imported() -> None:
    """What most commands import, so that it is there in each of their forks."""
    assert CliRunner().invoke(app, ["methods", "--help"]).exit_code == 0
    importlib.import_module("svdpeft.compare.statistics")
    list(TASKS.values())


@pytest.fixture
def world(imported: None, one_block: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the commands name, and small models by the names of large ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(language, "EMBEDDED", dict.fromkeys(language.EMBEDDED, one_block))
    monkeypatch.setattr(models, "load", small)
    monkeypatch.setattr(session, "load", small)
    monkeypatch.setattr(plan, "load", small)
    monkeypatch.setattr(language, "folder_of", Path)  # what is written there is made for each command
    monkeypatch.setattr(reading, "read_spec", shortened)
    for size, less in (("WINDOWS", 2), ("WINDOW", 64)):  # of a text that a language model may have forgotten
        monkeypatch.setattr(probes, size, less)
    tokenizer = small_tokenizer()
    llama(tokenizer, torch.float32).save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    (toml,) = re.findall(r"```toml\n(model = .*?)```", (ROOT / "docs" / "comparisons.md").read_text(), re.DOTALL)
    Path("spec.toml").write_text(toml)
    rows = [{"question": f"What is {i} and 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(6)]
    Path("data", "gsm8k").mkdir(parents=True)
    for split in ("train", "test"):
        Path("data", "gsm8k", f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    task = {
        "task": "my-task",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    own_rows()
    Path("rows.json").write_text(json.dumps([{"question": "Is it?"}]))
    Path("my-task.yaml").write_text(json.dumps(task))  # YAML takes JSON
    return tmp_path


def own_rows() -> None:
    """What is trained on where the documentation says so: rows, pictures, the files of the published runs."""
    own_data.jsonl("own.jsonl", own_data.PAIRS[:12])
    own_data.table("reviews.csv", own_data.REVIEWS[:12])
    Path("data", "reviews").mkdir(parents=True)
    for split in ("train", "test"):
        many = [{**row, "text": f"{row['text']}, {i}"} for i in range(8) for row in own_data.REVIEWS]
        own_data.table(f"data/reviews/{split}.csv", many)
    for i, name in enumerate(("cat", "dog")):
        Path("pictures", name).mkdir(parents=True)
        for shade in range(5):
            Image.new("RGB", (20, 20), (200 * i, 20 * shade, 0)).save(Path("pictures", name, f"{shade}.png"))
    (toml,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    Path("train.toml").write_text(toml)
    asked = [
        {"query": f"What is {i} and 2?", "original_question": f"Add 2 to {i}.", "type": "GSM_Rephrased"}
        for i in range(6)
    ]
    answered = [{**row, "response": f"The answer is: {i + 2}"} for i, row in enumerate(asked)]
    Path("data", "MetaMathQA-395K.json").write_text(json.dumps(answered))
    own_data.jsonl("data/codefeedback.jsonl", [{"query": f"Print {i}.", "answer": f"print({i})"} for i in range(6)])
    Path("data", "math").mkdir()
    problems = [{"problem": f"What is ${i} + 3$?", "solution": f"It is $\\boxed{{{i + 3}}}$."} for i in range(2)]
    own_data.jsonl("data/math/test.jsonl", problems)


def prepare(words: list[str], world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command needs to have been done before: an adapter, a comparison, a file."""
    if "flowers102" in words:
        flowers(world / "data", monkeypatch, (10, 10, 1))
    if "humaneval" in words:
        try:
            humaneval.problems()
        except AssetError as error:
            pytest.skip(f"HumanEval cannot be had here: {error}")
    for word in words:
        if word.endswith(".pth"):
            rwkv.write(rwkv_models.model(4, torch.float32, layers=1), world / word)
    if "--resume" in words:
        assert CliRunner().invoke(app, [word for word in words if word != "--resume"]).exit_code == 0
    if words[0] in FOLDERS:
        folders(words)
    if words[0] in ADAPTERS:
        adapters(words)
    if words[0] == "check":
        for name in words[1:]:
            svdpeft.attach(torch.nn.Sequential(torch.nn.Linear(3, 2)), LoRA(rank=1), ["0"]).save(name)
    if words[0] == "report":
        report_records.store(world / words[1])
    if (folder := value(words, "--adapter")) is not None:
        size, dtype = value(words, "--image-size"), getattr(torch, value(words, "--dtype") or "float32")
        loaded = small(words[1], num_classes=classes(words), image_size=int(size) if size else None, dtype=dtype)
        svdpeft.attach(loaded.model, LoRA(rank=1), train=[loaded.head] if classes(words) else []).save(folder)


def positional(words: list[str]) -> list[str]:
    """The words before the first option, the command's name among them."""
    return words[: next((i for i, word in enumerate(words) if word.startswith("--")), len(words))]


def adapters(words: list[str]) -> None:
    """The adapters that a command names, of its base."""
    *named, _ = positional(words)[1:]
    for name in (word.partition(":")[0] for word in named):
        adapter = svdpeft.attach(small(str(value(words, "--base"))).model, LoRA(rank=1), ["q_proj"])
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.1
        svdpeft.export_lora(adapter, name) if words[0] == "import" else adapter.save(name)


def folders(words: list[str]) -> None:
    """The models and adapters that a command names."""
    shutil.copytree("tiny", words[1])
    adapters = [word.partition(":")[0] for word in positional(words)[2:-1]] if words[0] == "merge" else []
    for name in [*adapters, *(words[2:3] if words[0] == "extract" else [])]:
        adapter = svdpeft.attach(AutoModelForCausalLM.from_pretrained("tiny"), LoRA(rank=1))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.1
        if name in adapters:
            adapter.save(name)
        else:
            adapter.merge(permanent=True)
            adapter.model.save_pretrained(name)


def covering(found: Sequence[str]) -> list[str]:
    """Those that have a word, but for the folder that they write, which none before them has; all with ``--all``."""
    known: set[str] = set()
    kept = []
    for command in found:
        words = words_of(command)
        own = {word for i, word in enumerate(words) if words[i - 1] != "--out"}
        if EVERYTHING or not own <= known:
            kept.append(command)
        known |= own
    return kept


@pytest.mark.apart  # with what each of them imports and loads
@pytest.mark.parametrize("command", covering(commands()))
def test_it_runs_as_it_is_printed(command: str, world: Path, monkeypatch: pytest.MonkeyPatch):
    words = words_of(command)
    prepare(words, world, monkeypatch)
    if words[0] == "train" and "--dry-run" not in words:  # most of the seconds are for a line that the others show
        monkeypatch.setattr(train, "PATIENCE", 0.0)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, f"{' '.join(words)}\n{result.output}"
    if "--json" in words:
        assert json.loads(result.stdout)
    elif words[0] in ("compare", "report"):
        folder = value(words, "--out") or (words[1] if words[0] == "report" else "runs/compare")
        assert (world / folder / "report.html").is_file()
        assert "failed" not in result.output
    else:
        assert result.stdout.strip()
    if "--dry-run" in words:
        assert "not known" not in result.stdout
    elif words[0] == "train":
        (out,) = {path.parent for path in world.rglob("training.json")}
        assert (out / "adapter.safetensors").is_file()
    for option in ("--csv", "--picture"):
        if (name := value(words, option)) is not None:
            assert (world / name).stat().st_size > 100


def test_the_commands_are_found():
    found = commands()
    assert len(found) > 20
    assert {command.split()[1] for command in found} == {
        "check",
        "compare",
        "report",
        "train",
        "eval",
        "inspect",
        "methods",
        "cite",
        "plan",
        *FOLDERS,
        *ADAPTERS,
    }


SPECIFICATIONS = [
    pytest.param(block, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL))
    if not block.startswith("[project")  # of a package of the reader's own
]


@pytest.mark.parametrize("block", SPECIFICATIONS)
def test_a_specification_is_read(block: str, tmp_path: Path):
    (tmp_path / "spec.toml").write_text(block)
    if "\nmethod =" in block:  # one method: a training
        assert read_order(tmp_path / "spec.toml", {}).recipe
        return
    spec = read_spec(tmp_path / "spec.toml")
    assert TASKS.make(spec.task, dict(spec.task_options))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_installed_is_offered(page: Path):
    extras = set(re.findall(r"^(\w+) = \[$|^(\w+) = \[.*\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    names = {name for pair in extras for name in pair if name}
    for asked in re.findall(r'pip install "?svdpeft\[([\w,]+)\]', page.read_text()):
        assert set(asked.split(",")) <= names
