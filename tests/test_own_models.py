"""Models of one's own by name: timm's folders, state dicts, functions; in Python and on the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn
from typer.testing import CliRunner

from svdpeft.cli import app
from svdpeft.compare.reading import read_spec
from svdpeft.models import Loaded, load

FACTORY = """
import torch
from torch import nn
from svdpeft.models import Loaded

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)).mean((2, 3)))

def build(num_classes=4):
    torch.manual_seed(5)
    return Net(num_classes)

def loaded(num_classes=4, image_size=32):
    config = {"input_size": (3, image_size, image_size), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    config |= {"interpolation": "bilinear", "crop_pct": 1.0}
    return Loaded(build(num_classes), "mine", config, "vision", "head")

def wrong():
    return 3
"""


@pytest.fixture
def resnet() -> Any:
    torch.manual_seed(1)
    return timm.create_model("resnet10t", num_classes=5).eval()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine_of_mine.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    yield "mine_of_mine"
    sys.modules.pop("mine_of_mine", None)


@pytest.mark.parametrize("form", ["{}", "timm:local-dir:{}"])
def test_a_folder_that_timm_wrote(form: str, resnet: Any, tmp_path: Path):
    save_for_hf(resnet, tmp_path / "model", safe_serialization="both")
    x = torch.randn(1, 3, 64, 64)
    name = form.format(tmp_path / "model")
    found = load(name, image_size=64)
    assert found.modality == "vision"
    assert found.head == "fc"
    assert torch.equal(found.model(x), resnet(x))
    assert load(name, num_classes=3).model(x).shape == (1, 3)
    assert read_spec(model=name).task == "mnist5k"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", "wrapped"])
def test_a_state_dict_of_an_architecture(suffix: str, resnet: Any, tmp_path: Path):
    file = tmp_path / f"weights{suffix.removeprefix('wrapped') or '.pth'}"
    state = resnet.state_dict()
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        wrapped = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}
        torch.save(wrapped if suffix == "wrapped" else state, file)
    x = torch.randn(1, 3, 64, 64)
    found = load(f"timm:resnet10t@{file}")
    assert torch.equal(found.model(x), resnet(x))
    assert load(f"timm:resnet10t@{file}", num_classes=3).model(x).shape == (1, 3)
    with pytest.raises(ValueError, match=r"the tensors of .* are not those of the architecture"):
        load(f"timm:resnet18@{file}")
    with pytest.raises(ValueError, match="there is no such file"):
        load(f"timm:resnet10t@{file}.gone")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        load(f"timm:resnet10t@{tmp_path / 'list.pth'}")


def test_a_function_that_builds(module: str):
    found = load(f"{module}:build", num_classes=6)
    assert isinstance(found.model.head, nn.Linear)
    assert found.model.head.out_features == 6
    assert found.head == "head"
    assert load(f"{module}:build", dtype=torch.bfloat16).model.head.weight.dtype == torch.bfloat16
    other = load(f"{module}:loaded", image_size=16)
    assert isinstance(other, Loaded)
    assert other.processor["input_size"] == (3, 16, 16)
    assert other.name == f"{module}:loaded"
    for name, words in (
        ("no_such_module:build", "there is no module 'no_such_module'"),
        (f"{module}:biuld", "has no function 'biuld': did you mean 'build'"),
        (f"{module}:wrong", "returned a int: it must return a module"),
    ):
        with pytest.raises(ValueError, match=words):
            load(name)
    with pytest.raises(ValueError, match=r"was called with .*image_size"):
        load(f"{module}:build", image_size=16)


def test_a_comparison_of_it_on_own_pictures(module: str, tmp_path: Path):
    """The command of the documentation, on a folder of pictures."""
    for split in ("train", "val", "test"):
        for i, shade in enumerate((30, 220)):
            folder = tmp_path / "pictures" / split / f"class{i}"
            folder.mkdir(parents=True)
            for k in range(6):
                Image.new("RGB", (24, 24), (shade + k,) * 3).save(folder / f"{k}.png")
    words = ["compare", "--model", f"{module}:loaded", "--task", "images", "--option", f"data={tmp_path / 'pictures'}"]
    words += ["--option", "shots=3", "--option", "validation_shots=1", "--methods", "lora,head-only", "--seeds", "0"]
    words += [
        "--targets",
        "all",
        "--budget",
        "none",
        "--batch-size",
        "2",
        "--epochs",
        "1",
        "--no-search",
        "--out",
        str(tmp_path / "out"),
    ]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "LoRA" in found.output
