"""Small things that strangers stumbled over, each with the right value."""

from __future__ import annotations

import copy
import stat
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import perturb
from torch import nn
from typer.testing import CliRunner

import svdpeft
from svdpeft import registry
from svdpeft.cli import app
from svdpeft.methods.base.allocation import Budget
from svdpeft.training import memory


def test_peak_memory_where_the_status_has_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t1 kB\n")
    for path in (tmp_path / "status", tmp_path / "none"):
        monkeypatch.setattr(memory, "_STATUS", path)
        assert memory.peak_memory() > 2**20


def test_roles_of_names_with_a_slash():
    model = nn.ModuleDict({"a/b": nn.Linear(4, 3), "c/d": nn.Linear(3, 2)})
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=1), ["a/b"], train=["c/d"])
    assert {role: len(found) for role, found in adapter.roles().items()} == {"L": 1, "A": 1, "whole": 2}


@pytest.mark.parametrize(("target", "matrices", "kept"), [(0.29, 100, 29), (0.57, 100, 57), (2.5, 3, 7), (1.1, 10, 11)])
def test_a_budget_of_triplets_is_the_product(target: float, matrices: int, kept: int):
    assert Budget(target_rank=target).kept(8 * matrices, matrices) == kept


@pytest.mark.parametrize("order", [0, 1])
def test_a_broken_plug_in_costs_its_own_entries_alone(order: int, monkeypatch: pytest.MonkeyPatch):
    points = [
        EntryPoint("broken", "no_such_module_at_all:Method", "svdpeft.methods"),
        EntryPoint("good", "svdpeft.methods.lora:LoRA", "svdpeft.methods"),
    ]
    loaded: list[str] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: points if order else points[::-1])
    real = EntryPoint.load
    monkeypatch.setattr(EntryPoint, "load", lambda self: (real(self), loaded.append(self.name)))
    fresh: Any = registry.Registry("method", "svdpeft.methods")
    with pytest.warns(UserWarning, match=r"the plug-in 'broken' \(no_such_module_at_all:Method\).*ModuleNotFoundError"):
        list(fresh)
    assert loaded == ["good"]
    with pytest.raises(ValueError, match="the plug-in 'broken' could not be loaded: ModuleNotFoundError"):
        _ = fresh["brokenmethod"]


def test_a_copy_that_is_made_within_a_call():
    """Whoever copies a model in a hook, such as an average of weights, gets a layer that is not being called."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    adapter = svdpeft.attach(model, svdpeft.PiSSA(rank=2))
    perturb(adapter)
    copies: list[nn.Sequential] = []
    handle = model[0].register_forward_hook(lambda *_: copies.append(copy.deepcopy(model)))
    x = torch.randn(3, 6)
    out = model(x)
    handle.remove()
    twin = copies[0]
    twin[0]._forward_hooks.popitem()
    assert torch.equal(twin(x), out)
    assert vars(twin[0]).keys() == vars(model[0]).keys()
    w = torch.compile(lambda: twin[0].weight, backend="eager", fullgraph=False)
    assert torch.allclose(w(), model[0].weight)


def test_files_of_the_svd_cache_can_be_read_by_others(tmp_path: Path):
    (tmp_path / "plain").touch()
    with svdpeft.svd_cache(tmp_path / "cache"):
        svdpeft.attach(nn.Linear(8, 6), svdpeft.PiSSA(rank=2))
    (file,) = (tmp_path / "cache").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_the_version_and_the_names_that_the_pages_use():
    found = CliRunner().invoke(app, ["--version"])
    assert found.exit_code == 0
    assert found.output.strip() == svdpeft.__version__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("models", "tasks", "training", "interop", "analysis", "zoo"):
            assert getattr(svdpeft, name).__name__ == f"svdpeft.{name}"
            assert name in dir(svdpeft)
    with pytest.raises(AttributeError, match="no attribute 'modles'"):
        _ = svdpeft.modles
