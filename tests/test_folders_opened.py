"""An adapter that is exported beside its model on the disk, beside the same with the model in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_models import CASES, contents, gpt2, llama, moved, resnet, saved, vit
from helpers import bits, perturb
from rows import one_each
from safetensors.torch import load_file

import svdpeft
from svdpeft import CheckpointError, LoRA, PiSSA
from svdpeft.folders import opened


def exported(source: Any, path: Path, max_rank: int | None) -> Any:
    """What an export says and writes, or why it does not."""
    try:
        report = svdpeft.export_lora(source, path, max_rank)
    except ValueError as error:
        return str(error)
    config = json.loads((path / "adapter_config.json").read_text())
    config.pop("base_model_name_or_path")
    config["modules_to_save"] = {*(config["modules_to_save"] or ())}  # a file of tensors has an order of its own
    tensors = {name: bits(tensor) for name, tensor in load_file(path / "adapter_model.safetensors").items()}
    return report.ranks, report.lost, report.notes, config, tensors


def same_as_in_memory(base: Path, adapter: Any, tmp_path: Path, max_rank: int | None = None) -> Any:
    adapter.save(tmp_path / "adapter")
    before = contents(base)
    found = exported(opened(base, tmp_path / "adapter"), tmp_path / "disk", max_rank)
    expected = exported(adapter, tmp_path / "memory", max_rank)
    assert found == expected
    assert contents(base) == before
    return found


@one_each
def test_every_method_is_exported_as_in_memory(method: Any, tmp_path: Path):
    model = llama()
    base = saved(model, tmp_path / "base")
    same_as_in_memory(base, moved(model, method, targets=["q_proj", "down_proj"]), tmp_path, max_rank=2)


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_weight_is_exported_as_in_memory(case: str, tmp_path: Path):
    build, options = CASES[case]
    model = build()
    base = saved(model, tmp_path / "base")
    adapter = svdpeft.attach(model, PiSSA(rank=2), **{"clip_rank": True, **options})
    perturb(adapter)
    same_as_in_memory(base, adapter, tmp_path)


def test_what_stands_beside_a_trained_tensor_is_read(tmp_path: Path):
    """PEFT saves the head with its bias, of which the adapter has the weight alone."""
    model, sizes = vit()
    base = saved(model, tmp_path / "base", **sizes)
    adapter = svdpeft.attach(model, LoRA(rank=2), ["fc1"], train=["head.weight"])
    perturb(adapter)
    *_, tensors = same_as_in_memory(base, adapter, tmp_path)
    assert tensors["base_model.model.head.bias"] == bits(model.head.bias)


def test_changed_statistics_are_exported_as_in_memory(tmp_path: Path):
    model, sizes = resnet()
    base = saved(model, tmp_path / "base", **sizes)
    adapter = svdpeft.attach(model, LoRA(rank=2), ["fc"])
    perturb(adapter)
    model.train()(torch.randn(4, 3, 32, 32))
    same_as_in_memory(base, adapter, tmp_path)


def test_llama_cpp_takes_it_too(tmp_path: Path):
    model = gpt2()
    base = saved(model, tmp_path / "base")
    adapter = svdpeft.attach(model, LoRA(rank=2), ["c_attn"])
    perturb(adapter)
    adapter.save(tmp_path / "adapter")
    ranks = svdpeft.export_gguf(opened(base, tmp_path / "adapter"), tmp_path / "disk.gguf")
    assert ranks == svdpeft.export_gguf(adapter, tmp_path / "memory.gguf")
    assert (tmp_path / "disk.gguf").read_bytes() == (tmp_path / "memory.gguf").read_bytes()


def test_another_base_is_refused(tmp_path: Path):
    model = llama()
    adapter = svdpeft.attach(model, LoRA(rank=2), ["q_proj"])
    adapter.save(tmp_path / "adapter")
    another = llama()
    with torch.no_grad():
        another.model.layers[0].self_attn.q_proj.weight.mul_(2)
    other = saved(another, tmp_path / "other")
    with pytest.raises(CheckpointError, match="another base"):
        opened(other, tmp_path / "adapter")
    assert opened(other, tmp_path / "adapter", check_base=False).sites


def test_the_same_base_in_another_precision_is_taken_with_a_warning(tmp_path: Path):
    model = llama(torch.float32)
    adapter = svdpeft.attach(model, LoRA(rank=2), ["q_proj"])
    perturb(adapter)
    adapter.save(tmp_path / "adapter")
    half = saved(llama(torch.float32).bfloat16(), tmp_path / "half")
    with pytest.warns(UserWarning, match="bfloat16"):
        contents = opened(half, tmp_path / "adapter")
    assert svdpeft.export_lora(contents, tmp_path / "out").ranks
