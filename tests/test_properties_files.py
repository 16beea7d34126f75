"""What a file and a seed give back: the same bits in another process, in another order, in another random state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapt, equal_bits, factors_of, go, host, merge, perturb
from rows import asked, label, one_each, states, variants
from torch import nn

from svdpeft import LoRA, attach
from svdpeft.methods.base import Method, PerSite

SAVED = asked("a file in another process")
READER = """
import json, sys, traceback, pathlib
import torch
from helpers import equal_bits, host, merge
import svdpeft
from svdpeft.decomposition import svd

torch.set_num_threads(1)
torch.manual_seed(987)
torch.rand(13)

def never(*args, **kwargs):
    raise AssertionError("something was decomposed at load")

svd.truncated_svd = never
torch.linalg.svd = torch.linalg.qr = torch.linalg.eigh = never
import svdpeft.methods.base
for module in list(sys.modules.values()):
    if getattr(module, "__name__", "").startswith("svdpeft") and hasattr(module, "truncated_svd"):
        module.truncated_svd = never
root = pathlib.Path(sys.argv[1])
wrong = {}
for row in json.loads((root / "rows.json").read_text()):
    try:
        folder = root / row["folder"]
        model, _ = host(tuple(row["kind"]))
        model.load_state_dict(torch.load(folder / "base.pt"), strict=False)
        truth = torch.load(folder / "truth.pt")
        state = torch.get_rng_state()
        adapter = svdpeft.load(model, folder / "adapter")
        assert torch.equal(state, torch.get_rng_state()), "the random state was used"
        for name, site in adapter.sites.items():
            assert site.factors.tensors().keys() == truth["factors"][name].keys()
            for role, tensor in site.factors.tensors().items():
                assert equal_bits(tensor, truth["factors"][name][role]), (name, role)
        assert [n for n, _ in adapter.named_parameters()] == truth["trains"]
        assert [n for n, p in model.named_parameters() if p.requires_grad] == truth["flags"]
        assert equal_bits(model(truth["x"]), truth["out"]), "the output differs"
        assert [m.to_json() for m in adapter.methods] == truth["methods"]
        assert str(adapter) == truth["repr"]
        merge(adapter)
        assert equal_bits(model(truth["x"]), truth["merged"]), "the merged output differs"
    except Exception:
        wrong[row["folder"]] = traceback.format_exc()
(root / "wrong.json").write_text(json.dumps(wrong))
"""


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every adapter saved here and loaded in one new process; what went wrong there, by row."""
    root = tmp_path_factory.mktemp("files")
    rows: list[dict[str, Any]] = []
    for i, (method, kind) in enumerate(SAVED):
        folder = root / str(i)
        folder.mkdir()
        model, x = host(kind)
        parameters = {name: p for name, p in model.named_parameters() if type(p) is nn.Parameter}
        torch.save(parameters | dict(model.named_buffers()), folder / "base.pt")  # torch loads no scales of integers
        adapter = adapt(model, method, train=("head.weight",))
        perturb(adapter)
        model.train()(x)
        model.eval()
        truth = {
            "factors": {name: site.factors.tensors() for name, site in adapter.sites.items()},
            "trains": [n for n, _ in adapter.named_parameters()],
            "flags": [n for n, p in model.named_parameters() if p.requires_grad],
            "methods": [m.to_json() for m in adapter.methods],
            "repr": str(adapter),
            "x": x,
            "out": model(x).detach(),
        }
        if i % 3:
            go(adapter, states(kind)[-1] if i % 2 else "merge")  # what is saved does not depend on it
        adapter.save(folder / "adapter", bases="stored")
        if adapter.state == "folded":
            adapter.unfold()
        if adapter.state == "attached":
            merge(adapter)
        torch.save(truth | {"merged": model(x).detach()}, folder / "truth.pt")
        rows.append({"folder": folder.name, "kind": kind})
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "reader.py").write_text(READER)
    places = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    environment = os.environ | {"PYTHONPATH": places, "PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, str(root / "reader.py"), str(root)], check=True, env=environment, timeout=1800)
    return json.loads((root / "wrong.json").read_text())


@pytest.mark.xdist_group("files")  # one worker writes them for all rows
@pytest.mark.parametrize("name", [same[0].name for same in variants()])
def test_loaded_in_another_process_is_bit_identical(loaded_elsewhere: dict[str, str], name: str):
    own = {str(i): f"{label(m)} on {label(kind)}" for i, (m, kind) in enumerate(SAVED) if m.name == name}
    assert own
    wrong = [f"{row}\n{loaded_elsewhere[i]}" for i, row in own.items() if i in loaded_elsewhere]
    assert not wrong, "\n".join(wrong)


@one_each
def test_factors_do_not_depend_on_the_order_of_modules(method: Method):
    def build(order: list[str], extra: bool) -> nn.ModuleDict:
        layers = {}
        for i, name in enumerate(("a", "b")):
            torch.manual_seed(i)
            layers[name] = nn.Linear(6, 9, dtype=torch.float64)
        model = nn.ModuleDict({name: layers[name] for name in order})
        if extra:
            model["c"] = nn.Linear(4, 7, dtype=torch.float64)
        return model

    alone = type(method).resolve is PerSite.resolve  # a method that shares ranks out looks at all sites
    options: dict[str, Any] = {"targets": "all-linear", "clip_rank": True}
    one = factors_of(adapt(build(["a", "b"], False), method, seed=3, **options))
    two = factors_of(adapt(build(["b", "a"], alone), method, seed=3, **options))
    for name in one:
        assert all(equal_bits(t, two[name][role]) for role, t in one[name].items())
    other = factors_of(adapt(build(["a", "b"], False), method, seed=4, **options))
    random = any(not equal_bits(t, other[n][role]) for n in one for role, t in one[n].items())
    assert random == method.draws


def test_sites_of_one_shape_get_different_random_factors():
    model = nn.ModuleDict({name: nn.Linear(5, 4) for name in "ab"})
    found = factors_of(attach(model, LoRA(rank=2)))
    assert not torch.equal(found["a"]["A"], found["b"]["A"])


@one_each
def test_thread_count_changes_factors_by_rounding_only(method: Method):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = nn.ModuleDict({"layer": nn.Linear(70, 90, dtype=torch.float64)})
        found.append(factors_of(adapt(model, method))["layer"])
    for role, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][role], rtol=1e-9, atol=1e-9)
