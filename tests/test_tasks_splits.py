"""What tasks read of their data and in which order, what they refuse, and every data set of torchvision by name."""

from __future__ import annotations

import json
import logging
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_language import language, llama, small_tokenizer
from torch import Tensor, nn
from torchvision import datasets
from transformers import AutoModelForCausalLM

from svdpeft.models import Loaded
from svdpeft.registry import TASKS
from svdpeft.tasks.base import SPLITS, TaskData, Unread
from svdpeft.tasks.generation import decode, positions
from svdpeft.tasks.gsm8k import GSM8K
from svdpeft.tasks.humaneval import HumanEval
from svdpeft.tasks.imagefolder import Images
from svdpeft.tasks.math import MATH
from svdpeft.tasks.mnist5k import Mnist5k
from svdpeft.tasks.sources import read
from svdpeft.tasks.wordproblems import WordProblems


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    return language(llama(small_tokenizer()), small_tokenizer())


def vision() -> Loaded:
    config = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1}
    return Loaded(nn.Linear(2, 2), "tiny", config, "vision", None)


def unread(data: TaskData) -> set[str]:
    return {split for split in SPLITS if isinstance(getattr(data, split), Unread)}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def sums(start: int, count: int) -> list[dict[str, Any]]:
    return [{"question": f"What is {i} and 1?", "answer": f"#### {i + 1}"} for i in range(start, start + count)]


# -- the splits that are asked for -----------------------------------------------------------------------------------


@pytest.mark.parametrize("train_on", ["gsm8k", "metamathqa"])
def test_test_split_needs_no_training_data(tiny: Loaded, tmp_path: Path, train_on: str, caplog):
    write(tmp_path / "test.jsonl", sums(100, 3))
    task = GSM8K(test_size=2, path=str(tmp_path), train_on=train_on, train_data=str(tmp_path / "nowhere"))
    with caplog.at_level(logging.WARNING, "svdpeft"):
        data = task.prepare(tiny, splits=("test",))
    assert not caplog.records
    assert unread(data) == {"train", "validation"}
    assert data.evaluate(tiny.model, data.test, ["loss"])["loss"]
    with pytest.raises(LookupError, match="this split was not prepared"):
        data.train[0]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        task.prepare(tiny, splits=("validation",))


def test_validation_is_the_same_whatever_else_is_asked(tiny: Loaded, tmp_path: Path):
    write(tmp_path / "train.jsonl", sums(0, 9)), write(tmp_path / "test.jsonl", sums(8, 2))
    task = GSM8K(4, 2, 2, path=str(tmp_path))
    every = task.prepare(tiny)
    assert unread(every) == set()
    for split in SPLITS:
        data = task.prepare(tiny, splits=(split,))
        assert unread(data) == set(SPLITS) - {split}
        assert getattr(data, split).examples == getattr(every, split).examples
    assert [e.gold for e in every.validation.examples] == [7.0, 8.0]  # 9 is a test question


def test_problems_of_humaneval_need_no_codefeedback(tiny: Loaded):
    data = HumanEval(metric="loss", test_size=2, train_data="nowhere").prepare(tiny, splits=("test",))
    assert unread(data) == {"train", "validation"}
    assert len(data.test) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("split", SPLITS)
def test_other_tasks_prepare_one_split(tiny: Loaded, split: Any, tmp_path: Path):
    others = {f"{other}_size": 10**6 for other in SPLITS if other != split}  # what is not asked for is not checked
    for task, loaded in ((WordProblems(**others), tiny), (Mnist5k(**others), vision())):
        every, one = type(task)().prepare(loaded), task.prepare(loaded, splits=(split,))
        assert unread(one) == set(SPLITS) - {split}
        assert len(getattr(one, split)) == len(getattr(every, split))
    from PIL import Image

    for part, count in (("train", 1), ("test", 3)):  # too few to train on, enough for the test
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (50 * i,) * 3).save(tmp_path / part / name / f"{i}.png")
    task = Images(data=str(tmp_path))
    if split == "test":
        assert len(task.prepare(vision(), splits=(split,)).test) == 6  # type: ignore[arg-type]
    else:
        with pytest.raises(ValueError, match="which needs"):
            task.prepare(vision(), splits=(split,))


# -- the order of MATH -----------------------------------------------------------------------------------------------


def test_every_part_of_math_has_all_subjects(tiny: Loaded, tmp_path: Path):
    pytest.importorskip("math_verify")
    for split in ("train", "test"):
        for subject in ("algebra", "geometry"):
            for i in range(20):
                row = {"problem": f"{split} {subject} {i}?", "solution": rf"$\boxed{{{i}}}$"}
                write(tmp_path / split / subject / f"{i}.json", [row])
    task = MATH(12, 12, 12, path=str(tmp_path))
    data = task.prepare(tiny)
    for split in SPLITS:
        counts = [sum(subject in e.ask for e in getattr(data, split).examples) for subject in ("algebra", "geometry")]
        assert sum(counts) == 12
        assert min(counts) >= 3, (split, counts)
    shorter = MATH(6, 12, 5, path=str(tmp_path)).prepare(tiny)
    assert shorter.test.examples == data.test.examples[:5]  # type: ignore[attr-defined]
    assert shorter.train.examples == data.train.examples[:6]  # type: ignore[attr-defined]
    both = tmp_path / "one.jsonl"  # the order is that of the problems, not of the files
    rows = [json.loads(file.read_text()) for file in sorted((tmp_path / "test").rglob("*.json"), reverse=True)]
    again = MATH(1, 1, 12, path=str(write(both, rows))).prepare(tiny, splits=("test",))
    assert again.test.examples == data.test.examples  # type: ignore[attr-defined]


# -- values of the wrong type ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["abc", 1.5, True])
def test_sizes_are_whole_numbers(tiny: Loaded, tmp_path: Path, value: Any):
    for name, loaded in (("wordproblems", tiny), ("mnist5k", vision())):
        with pytest.raises(ValueError, match=f"test_size {value!r} of task '{name}' is no whole number"):
            TASKS.make(name, {"test_size": value}).prepare(loaded)
    for field in ("max_length", "max_new_tokens", "decode_batch"):
        with pytest.raises(ValueError, match=f"{field} {value!r} of task 'wordproblems' is no whole number"):
            TASKS.make("wordproblems", {field: value})
    with pytest.raises(ValueError, match=f"shots {value!r} of task 'images' is no whole number"):
        Images(data=str(tmp_path), shots=value)


def test_other_values_of_the_wrong_type(tiny: Loaded):
    with pytest.raises(ValueError, match="decode_batch None of task 'wordproblems' is no whole number"):
        WordProblems(decode_batch=None)  # type: ignore[arg-type]
    for name, options in (("gsm8k", {"train_on": 3}), ("humaneval", {"metric": 3}), ("wordproblems", {"engine": 3})):
        with pytest.raises(ValueError, match="Known: "):
            TASKS.make(name, options)
    with pytest.raises(ValueError, match="path 3 is no path of a file or folder"):
        GSM8K(path=3).prepare(tiny)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="allow_code_execution 'no' is neither true nor false"):
        HumanEval(allow_code_execution="no")  # type: ignore[arg-type]


# -- positions -------------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
FEED = {"intermediate_size": 8, "max_position_embeddings": 16}
MODELS = {  # configuration, and the number of tokens that the model can read
    "GPT2": ({"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}, 16),
    "OPT": ({**SMALL, "ffn_dim": 8, "word_embed_proj_dim": 8, "max_position_embeddings": 16, "pad_token_id": 1}, 16),
    "Roberta": ({**SMALL, **FEED, "is_decoder": True, "pad_token_id": 1, "max_position_embeddings": 18}, 16),
    "GPTJ": ({"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "rotary_dim": 4}, 16),
    "Llama": ({**SMALL, **FEED, "pad_token_id": 0}, None),
    "Bloom": ({"hidden_size": 8, "n_layer": 1, "n_head": 2}, None),
    "XGLM": ({"d_model": 8, "num_layers": 1, "attention_heads": 2, "ffn_dim": 8, "max_position_embeddings": 16}, None),
}


def model_of(name: str, **options: Any) -> Any:
    config = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 0, **MODELS[name][0], **options}
    return AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**config)).eval()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_positions_are_as_many_as_a_model_reads(name: str):
    model, room = model_of(name), MODELS[name][1]
    assert positions(model) == room
    ids = torch.full((1, 40), 7)
    model(input_ids=ids[:, : room or 40])
    if room:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids[:, : room + 1])


def test_decoding_goes_to_the_last_position_and_is_refused_beyond():
    model: Any = model_of("GPT2", n_positions=64)
    tokenizer = small_tokenizer()
    seen: list[Tensor] = []
    model.transformer.wpe.register_forward_hook(lambda _module, args, _out: seen.append(args[0]))
    prompts = [torch.full((3,), 7), torch.full((9,), 7)]
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0  # else a short answer would prove nothing
        model.transformer.ln_f.bias.copy_(10 * model.lm_head.weight[9])
    decode(model, tokenizer, prompts, 56)
    assert int(torch.cat([ids.flatten() for ids in seen]).max()) == 63
    with pytest.raises(
        ValueError, match=r"positions for 64 tokens, not for a prompt of 9 .*lower max_new_tokens to 56"
    ):
        decode(model, tokenizer, prompts, 57)
    with pytest.raises(ValueError, match="the prompt alone is too long"):
        decode(model, tokenizer, [torch.full((65,), 7)], 1)


def test_what_a_model_has_no_positions_for_is_refused_before_the_training(tmp_path: Path):
    write(tmp_path / "train.jsonl", sums(0, 9)), write(tmp_path / "test.jsonl", sums(20, 2))
    tokenizer = small_tokenizer()

    def prepare(room: int, splits: Any = SPLITS, **options: Any) -> TaskData:
        task = GSM8K(4, 2, 2, **{"path": str(tmp_path), "max_new_tokens": 10, **options})
        return task.prepare(language(model_of("GPT2", n_positions=room), tokenizer), splits=splits)

    data = prepare(512)
    longest = max(len(row["input_ids"]) for split in SPLITS for row in getattr(data, split))
    asked = max(map(len, [*data.validation.asks, *data.test.asks]))  # type: ignore[attr-defined]
    room = asked + 60
    assert longest < room
    prepare(room, max_new_tokens=61)
    with pytest.raises(ValueError, match=f"positions for {room} .* max_new_tokens=62: lower max_new_tokens to 61"):
        prepare(room, max_new_tokens=62)
    with pytest.raises(ValueError, match=rf"the train split .* example of \d+: lower max_length to {asked + 1}"):
        prepare(asked + 1, splits=("train",))
    prepare(asked + 1, splits=("train",), max_length=asked + 1)
    with pytest.raises(ValueError, match=r"the test split .* example of \d+: no option shortens it"):
        prepare(asked + 1, splits=("test",), max_length=asked + 1)


# -- torchvision's data sets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", datasets.__all__)
def test_any_name_of_torchvision_is_read_or_refused(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match=rf"torchvision's {name}\b"):
        read(f"torchvision:{name}", str(tmp_path))


def numbers(path: Path, kind: int, values: Tensor) -> None:
    """MNIST's file layout: a magic number, the sizes, and the values, the first byte first."""
    head = struct.pack(f">{values.ndim + 1}i", kind * 256 + values.ndim, *values.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + values.numpy().astype(">i4" if kind == 12 else "u1").tobytes())


def test_emnist_and_qmnist(tmp_path: Path):
    labels = torch.arange(47).repeat(2)
    for part, count in (("train", 94), ("test", 47)):
        numbers(tmp_path / f"EMNIST/raw/emnist-balanced-{part}-images-idx3-ubyte", 8, torch.zeros(count, 28, 28))
        numbers(tmp_path / f"EMNIST/raw/emnist-balanced-{part}-labels-idx1-ubyte", 8, labels[:count])
        numbers(tmp_path / f"QMNIST/raw/qmnist-{part}-images-idx3-ubyte", 8, torch.zeros(count, 28, 28))
        numbers(tmp_path / f"QMNIST/raw/qmnist-{part}-labels-idx2-int", 12, (labels % 10)[:count, None].expand(-1, 8))
    found = read("torchvision:EMNIST", str(tmp_path))
    assert len(found.classes) == 47
    assert found.train.labels.tolist() == labels.tolist()
    assert found.test is not None
    assert found.test.labels.tolist() == list(range(47))
    found = read("torchvision:QMNIST", str(tmp_path))
    assert found.train.labels.tolist() == (labels % 10).tolist()
    assert found.train.picture(0).size == (28, 28)


def test_splits_of_places365(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def made(self: Any, root: Path, split: str, loader: Any) -> None:
        asked.append(split)
        self.imgs, self.classes, self.loader, self.transforms = [("a.jpg", 0), ("b.jpg", 1)], ["a", "b"], loader, None

    monkeypatch.setattr(datasets.Places365, "__init__", made)
    found = read("torchvision:Places365", str(tmp_path))
    assert asked == ["train-standard", "val"]  # the pictures of "test" have no labels
    assert found.train.items[0] == ("a.jpg", 0)
