"""Files beside adapters that hold what they may not: calibrations, training states, PEFT's, RWKV's, TOML."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, refused, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torture.damage import NASTY, changed
from torture.readers import READERS
from torture.readers import damaged as torture

import svdpeft
from svdpeft import SORSA, Calibration, CheckpointError, LoRA, attach, import_peft
from svdpeft.compare.reading import read_spec
from svdpeft.finetuning.order import read_order
from svdpeft.models import rwkv
from svdpeft.training.resume import FILE, load_checkpoint, load_training_state, save_checkpoint, save_training_state

DEEP = "[" * 100_000 + "]" * 100_000


def metadata_of(file: Path, **metadata: str) -> None:
    save_file(load_file(file), file, metadata=metadata)


@contextmanager
def read_or_refused(path: Path) -> Iterator[None]:
    """The block ends well, or with an error that names the path, which ends here."""
    try:
        yield
    except ValueError as error:
        if str(path) not in str(error):
            raise AssertionError(f"{path} is not named") from error


@st.composite
def damaged(draw: Any, value: Any) -> Any:
    """A value of JSON with one to three changes."""
    copy = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        changed(draw, copy)
    return copy


# -- calibrations ----------------------------------------------------------------------------------------------


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    tensors = {"a/second": torch.ones(3, 3), "a/total": torch.ones(3)}
    sites = {"a": {"count": 4, "second": "a/second", "total": "a/total"}}
    metadata = {"format": "svdpeft calibration 1", "sites": json.dumps(sites)}
    save_file(tensors, tmp_path / "seen", metadata=metadata)
    return tmp_path / "seen"


@given(damaged({"a": {"count": 4, "second": "a/second", "total": "a/total"}}))
def test_a_calibration_is_read_or_refused(seen: Path, sites: Any):
    metadata_of(seen, format="svdpeft calibration 1", sites=json.dumps(sites))
    with read_or_refused(seen):
        Calibration.load(seen)


@pytest.mark.parametrize("sites", [None, DEEP, "3", "{", '{"a": {"count": Infinity}}'])
def test_what_is_no_calibration(seen: Path, sites: str | None):
    metadata_of(seen, format="svdpeft calibration 1", **({} if sites is None else {"sites": sites}))
    with pytest.raises(ValueError, match="seen"):
        Calibration.load(seen)
    with pytest.raises(ValueError, match="IsADirectoryError"):
        Calibration.load(seen.parent)


# -- the state of a training -----------------------------------------------------------------------------------


def remembering() -> svdpeft.Adapter:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    adapter = attach(model, SORSA(rank=2, gamma={"target": 0.1}), ["0"])
    adapter.sites["0"].factors.memory["x"] = torch.ones(1)
    return adapter


@pytest.mark.parametrize("steps", [None, "", "-1", "1.0", "²", "9" * 5000, DEEP])
def test_a_training_state_without_a_number_of_steps(tmp_path: Path, steps: str | None):
    """Nothing has changed then, not the weights either."""
    adapter = remembering()
    save_checkpoint(adapter, tmp_path)
    with torch.no_grad():
        adapter.sites["0"].factors.L.add_(1)
    metadata_of(tmp_path / FILE, **({} if steps is None else {"steps": steps}))
    for load in (load_checkpoint, load_training_state):
        with refused(adapter.model, str(tmp_path), "does not say the step", error=CheckpointError):
            load(adapter, tmp_path)
    assert list(adapter.sites["0"].factors.memory) == ["x"]


@pytest.mark.parametrize("data", [b"", b"words", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0{]"])
def test_a_training_state_that_is_none(tmp_path: Path, data: bytes):
    adapter = remembering()
    save_training_state(adapter, tmp_path)
    (tmp_path / FILE).write_bytes(data)
    with refused(adapter.model, FILE, "is damaged or cut off", error=CheckpointError):
        load_training_state(adapter, tmp_path)


# -- PEFT's ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "lora"
    svdpeft.export_lora(attach(plain(), LoRA(rank=2), ["0"]), folder)
    return folder


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4))


@settings(max_examples=100)
@given(st.data())
def test_a_folder_of_peft_is_read_or_refused(peft: Path, tmp_path: Path, data: Any):
    config = json.loads((peft / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(data.draw(damaged(config))))
    (tmp_path / "adapter_model.safetensors").write_bytes((peft / "adapter_model.safetensors").read_bytes())
    model = plain()
    before = snapshot(model)
    with read_or_refused(tmp_path):
        import_peft(model, tmp_path)
        return
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("config", [DEEP, "", "[]", '{"peft_type": []}'])
def test_what_is_no_configuration_of_peft(peft: Path, tmp_path: Path, config: str):
    (tmp_path / "adapter_config.json").write_text(config)
    (tmp_path / "adapter_model.safetensors").write_bytes((peft / "adapter_model.safetensors").read_bytes())
    with refused(model := plain(), str(tmp_path)):
        import_peft(model, tmp_path)


def test_a_scale_of_peft_that_no_float_can_be(peft: Path, tmp_path: Path):
    config = json.loads((peft / "adapter_config.json").read_text()) | {"lora_alpha": 10**400}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((peft / "adapter_model.safetensors").read_bytes())
    with refused(model := plain(), str(tmp_path), "OverflowError"):
        import_peft(model, tmp_path)


# -- RWKV's ----------------------------------------------------------------------------------------------------


def official(**changed: Any) -> dict[Any, Any]:
    state: dict[Any, Any] = {
        "emb.weight": torch.ones(9, 4),
        "blocks.0.att.key.weight": torch.ones(4, 4),
        "blocks.0.ffn.key.weight": torch.ones(8, 4),
        "blocks.0.att.r_k": torch.ones(2, 2),
    }
    return state | {name.replace("__", "."): value for name, value in changed.items()}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({3: torch.ones(1)}, "not a mapping from names"),
        (official(emb__weight=torch.ones(9)), "not enough values"),
        (official(blocks__0__att__key__weight=torch.tensor(1.0)), "IndexError"),
        (official(emb__weight=torch.ones(1, 1).expand(10**6, 10**6)), "larger than what the file holds"),
    ],
)
def test_what_is_no_rwkv_checkpoint(tmp_path: Path, state: Any, words: str):
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=words) as caught:
        rwkv.read(tmp_path / "x.pth")
    assert "x.pth" in str(caught.value)


@settings(max_examples=100)
@given(st.data())
def test_bytes_that_are_no_rwkv_checkpoint(tmp_path: Path, data: Any):
    """As a zip file and as the older stream of pickles."""
    new = data.draw(st.booleans())
    torch.save(official(), tmp_path / "x.pth", _use_new_zipfile_serialization=new)
    content = bytearray((tmp_path / "x.pth").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.pth").write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    with read_or_refused(tmp_path / "x.pth"):
        rwkv.read(tmp_path / "x.pth")


# -- TOML ------------------------------------------------------------------------------------------------------

VALUES = [json.dumps(value) for value in NASTY if isinstance(value, int | float | str) and value != "\x00"]
VALUES += ["nan", "-inf", "9" * 5000, "1979-05-27", "[]", "[[1]]", "{}", "{a = [1]}", f"[{DEEP}]"]
VALUES += ['[{name = "lora", rank = {x = []}}]', "[{name = 1}]", '[{name = "sorsa", gamma = []}]', '["lora:rank=[1"]']
NAMES = ["model", "method", "methods", "task", "lr", "rank", "seeds", "seed", "budgets", "search", "search.trials"]
NAMES += [
    "scheduler",
    "mixed_precision",
    "dtype",
    "targets",
    "option",
    "option.train_size",
    "task_options",
    "batch_size",
]
METHODS = ["lora", "sorsa", "oft", "dora", "svft", "vera", "tinylora", "partial"]


@settings(max_examples=300)
@given(st.data())
def test_toml_is_read_or_refused(tmp_path: Path, data: Any):
    name, value = data.draw(st.sampled_from(NAMES)), data.draw(st.sampled_from(VALUES))
    method = data.draw(st.sampled_from(METHODS))
    options = ["rank", "alpha", "gamma", "block_size", "inner", "pattern", "u", "layers"]
    option = f'methods = [{{name = "{method}", {data.draw(st.sampled_from(options))} = {value}}}]'
    text = data.draw(st.sampled_from([f"{name} = {value}", option]))
    (tmp_path / "order.toml").write_text(text)
    for read in (read_spec, lambda file: read_order(file, {"model": "smollm2-135m", "task": "wordproblems"})):
        try:
            read(tmp_path / "order.toml")
        except ValueError:
            continue


def test_bytes_that_are_no_toml(tmp_path: Path):
    for data in (b"\xff\xfe", b"a = " + DEEP.encode(), b"a = [", b"a = " + b"9" * 5000):
        (tmp_path / "order.toml").write_bytes(data)
        for read in (read_spec, lambda file: read_order(file, {})):
            with pytest.raises(ValueError, match=r"order\.toml: "):
                read(tmp_path / "order.toml")


# -- every reader ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_of_every_reader(name: str, tmp_path: Path):
    """``make torture`` has thousands."""
    READERS[name].write(tmp_path / "files")
    READERS[name].read(tmp_path / "files")
    torture(READERS[name], tmp_path / "files", 20)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", "[]", "config.json is damaged: it holds a list"),
        ("config.json", DEEP, "config.json is damaged"),
        ("model.safetensors.index.json", '{"weight_map": []}', r"its weight_map is \[\]"),
        ("model.safetensors.index.json", '{"weight_map": {"a": [[]]}}', r"a is in \[\[\]\], no file beside it"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}', "no file beside it"),
    ],
    ids=range(5),
)
def test_a_folder_of_a_model_with_something_wrong(tmp_path: Path, file: str, content: str, words: str):
    """A file of another folder was read, and one of that name would have been written beside the new folder."""
    READERS["model-folder"].write(tmp_path / "files")
    (tmp_path / "files" / file).write_text(content)
    with pytest.raises(ValueError, match=words):
        READERS["model-folder"].read(tmp_path / "files")


def test_a_file_that_is_refused_is_named_once(tmp_path: Path):
    torch.save({"emb.weight": torch.ones(9, 4)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="no RWKV checkpoint") as told:
        rwkv.read(tmp_path / "x.pth")
    assert str(told.value).count("x.pth") == 1
