"""What a program has switched on around us changes nothing that we make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapt, perturb
from rows import methods
from torch import nn

from svdpeft import SORSA, LoRA, attach, calibrate, load


def net() -> nn.Sequential:
    torch.manual_seed(0)
    with torch.device("cpu"), torch.inference_mode(False):
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))


def ambients() -> dict[str, Any]:
    return {"meta": torch.device("meta"), "inference": torch.inference_mode(), "no_grad": torch.no_grad()}


@pytest.mark.parametrize("where", ambients())
@pytest.mark.parametrize("method", [m for m in methods(factored=True) if not m.needs], ids=str)
def test_the_start_is_the_same(method: Any, where: str):
    def start() -> tuple[Any, Any]:
        model = net()
        return model, adapt(model, method, targets=["0", "2"])

    _, plain = start()
    with ambients()[where]:
        model, inside = start()
    expected = {f"{name}/{role}": t for name, site in plain.sites.items() for role, t in site.factors.tensors().items()}
    found = {f"{name}/{role}": t for name, site in inside.sites.items() for role, t in site.factors.tensors().items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].device.type == "cpu"
        assert torch.equal(found[name], tensor), name
    assert not any(p.is_inference() for p in inside.parameters())
    model.train()(torch.randn(3, 6)).sum().backward()


@pytest.mark.parametrize("where", ambients())
def test_files_and_calibrations(where: str, tmp_path: Path):
    adapter = attach(net(), SORSA(rank=2))
    perturb(adapter)
    adapter.save(tmp_path)
    expected = {name: adapter.delta(name) for name in adapter.sites}
    batch = torch.randn(4, 6)
    with ambients()[where]:
        model = net()
        loaded = load(model, tmp_path)
        seen = calibrate(net(), [batch])
    for name, delta in expected.items():
        assert torch.equal(loaded.delta(name), delta)
    assert not any(p.is_inference() for p in loaded.parameters())
    plain = calibrate(net(), [batch])
    for name, each in plain.items():
        assert torch.equal(seen[name].second, each.second)


def test_a_default_device_that_was_set():
    torch.set_default_device("meta")
    try:
        adapter = attach(net(), LoRA(rank=2))
    finally:
        torch.set_default_device(None)  # and not "cpu", which would go through Python for every call from here on
    assert {p.device.type for p in adapter.parameters()} == {"cpu"}
