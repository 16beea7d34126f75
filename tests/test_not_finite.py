"""What is not finite is refused by its site, before anything is written: merges, files, exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import assert_same, perturb, refused, snapshot
from torch import nn

from svdpeft import SVFT, LoRA, PiSSA, attach
from svdpeft.interop.peft_export import export_lora


def net(dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"one": nn.Linear(6, 5), "two": nn.Linear(5, 4), "head": nn.Linear(4, 3)}).to(dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("method", [LoRA(rank=1), PiSSA(rank=1), SVFT()], ids=str)
def test_a_diverged_adapter_is_not_merged(method, permanent: bool, value: float):
    model = net()
    adapter = attach(model, method, ["one", "two"])
    perturb(adapter)
    with torch.no_grad():
        next(p for name, p in adapter.named_parameters() if name.startswith("two/")).view(-1)[0] = value
    with refused(model, "two cannot be merged: the weight with its update would not be finite: the training has diver"):
        adapter.merge(permanent=permanent)
    assert adapter.state == "attached"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sum_that_the_dtype_does_not_hold_is_not_merged(dtype: torch.dtype):
    model = net(dtype)
    adapter = attach(model, LoRA(rank=1), ["one", "two"])
    with torch.no_grad():
        factors = adapter.sites["two"].factors
        factors.L.fill_(torch.finfo(dtype).max)
        factors.A.fill_(1.002)  # float32 holds it still
    with refused(model, "two cannot be merged", f"it overflows {dtype}"):
        adapter.merge()
    with torch.no_grad():
        factors.L.fill_(1)
    adapter.merge()
    adapter.unmerge()


def test_a_diverged_adapter_is_not_saved_over_a_good_one(tmp_path: Path):
    model = net()
    before = snapshot(model)
    adapter = attach(model, PiSSA(rank=1), ["one", "two"], train=["head"])
    adapter.save(tmp_path / "a")
    files = {file: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    for name, parameter in adapter.named_parameters():
        with torch.no_grad():
            kept = parameter.detach().clone()
            parameter.view(-1)[-1] = float("nan")
            with pytest.raises(ValueError, match=f"{name} holds values that are not finite: the training has diverged"):
                adapter.save(tmp_path / "a")
            parameter.copy_(kept)
    assert {file: file.read_bytes() for file in (tmp_path / "a").iterdir()} == files
    adapter.detach()
    assert_same(before, snapshot(model))


def test_a_diverged_adapter_is_not_exported(tmp_path: Path):
    model = net()
    adapter = attach(model, LoRA(rank=1), ["one", "two"])
    with torch.no_grad():
        adapter.sites["two"].factors.L[0] = float("nan")
    with pytest.raises(ValueError, match="two holds values that are not finite"):
        export_lora(adapter, tmp_path / "a")
    assert not list(tmp_path.iterdir())
