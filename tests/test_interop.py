"""An exported LoRA is the adapted model, and its rank is known before it is written."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import svdpeft
from svdpeft.interop.peft_export import export_lora, export_ranks

METHODS = [
    svdpeft.LoRA(rank=2, alpha=6),
    svdpeft.PiSSA(rank=2),
    svdpeft.SORSA(rank=2, alpha=3),
    svdpeft.SVFT(),
    svdpeft.SVFT(rank=3, pattern="banded", off_diagonals=1),
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 10, (3, 2), stride=2, padding=1)
        self.fc = nn.Linear(10, 7)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


def tuned(method, model):
    adapter = svdpeft.attach(model, method, "all")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return adapter


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_exported_lora_is_the_adapted_model(method, tmp_path):
    model, x = Net(), torch.randn(2, 3, 8, 9)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapter = tuned(method, model)
    stated = export_ranks(adapter)
    assert stated == export_lora(adapter, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, site in adapter.sites.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        rank = config["rank_pattern"].get(name, config["r"])
        assert a.shape[0] == b.shape[1] == rank == stated[name]
        assert rank == torch.linalg.matrix_rank(site.delta().flatten(1), rtol=1e-5)
        assert stated[name] <= site.method.export_rank(*site.shape[1:])
        assert config["alpha_pattern"].get(name, config["lora_alpha"]) == rank  # so that PEFT's scale is one
    # the two layers written out, with the update applied as PEFT does: A first, then B
    a, b = (tensors[f"base_model.model.conv.lora_{side}.weight"] for side in "AB")
    h = F.conv2d(x, base["conv.weight"], base["conv.bias"], 2, 1) + F.conv2d(F.conv2d(x, a, None, 2, 1), b)
    h = torch.relu(h).mean((2, 3))
    a, b = (tensors[f"base_model.model.fc.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(h @ (base["fc.weight"] + b @ a).T + base["fc.bias"], model(x))


@pytest.mark.parametrize("layer", [nn.Linear(5, 6), Conv1D(6, 5)], ids=["linear", "gpt2"])
def test_an_export_says_how_the_weights_lie(layer, tmp_path):
    export_lora(tuned(svdpeft.LoRA(rank=2), nn.ModuleDict({"fc": layer})), tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == isinstance(layer, Conv1D)


def test_what_a_lora_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    def refuse(adapter, message):
        with pytest.raises(ValueError, match=message):
            export_lora(adapter, tmp_path / "x")
        assert not list(tmp_path.iterdir())

    refuse(svdpeft.attach(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), svdpeft.LoRA(rank=1), "all"), "2 groups")
    refuse(svdpeft.attach(Net(), svdpeft.LoRA(rank=1), ["conv"], train=["fc"]), "fc.weight is trained whole")
    refuse(svdpeft.attach(Net(), svdpeft.Full()), "no factors")
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=1))
    model(torch.randn(6, 4))
    refuse(adapter, "running_mean")
    one = nn.Linear(5, 5)
    two = nn.Linear(5, 5)
    two.weight = one.weight
    refuse(svdpeft.attach(nn.Sequential(one, two), svdpeft.LoRA(rank=1)), "shares its weight")
    refuse(svdpeft.attach(nn.Sequential(nn.Embedding(5, 4)), svdpeft.LoRA(rank=1), "all"), "of kind 'embedding'")
    fused = nn.ModuleDict({"qkv": nn.Linear(4, 12)})
    refuse(svdpeft.attach(fused, svdpeft.LoRA(rank=1), ["qkv[q]"]), r"qkv\[q\] is the part 'q' of a weight")
    attention = nn.MultiheadAttention(4, 2)
    refuse(svdpeft.attach(attention, svdpeft.LoRA(rank=1), ["out_proj"]), "the model reads out_proj")


def test_an_export_does_not_overwrite(tmp_path):
    adapter = tuned(svdpeft.LoRA(rank=1), Net())
    export_lora(adapter, tmp_path / "lora")
    with pytest.raises(FileExistsError, match="does not overwrite"):
        export_lora(adapter, tmp_path / "lora")
