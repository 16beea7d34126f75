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
    assert stated == export_lora(adapter, tmp_path / "lora").ranks
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
    def refuse(adapter, message, **options):
        with pytest.raises(ValueError, match=message):
            export_lora(adapter, tmp_path / "x", **options)
        assert not list(tmp_path.iterdir())

    refuse(svdpeft.attach(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), svdpeft.LoRA(rank=1), "all"), "2 groups")
    refuse(svdpeft.attach(nn.Sequential(nn.Conv2d(4, 6, 3, dilation=2)), svdpeft.LoRA(rank=1), "all"), "a dilation")
    reflecting = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"))
    refuse(svdpeft.attach(reflecting, svdpeft.LoRA(rank=1), "all"), "padding_mode='reflect'")
    refuse(svdpeft.attach(Net(), svdpeft.Full()), "no factors")
    refuse(svdpeft.attach(Net(), svdpeft.OFT(block_size=2), ["fc"]), "full rank.*merge instead, or say max_rank=")
    refuse(svdpeft.attach(Net(), svdpeft.LoRA(rank=1)), "max_rank 0 is not a whole number of at least 1", max_rank=0)
    nested = nn.ModuleDict({"block": Scaled()})
    refuse(
        svdpeft.attach(nested, svdpeft.LoRA(rank=1), train=["block.gain"]), "block.gain is trained whole, and belongs"
    )
    stacked = nn.ModuleDict({"fc": nn.Linear(3, 3), "my_fc": nn.Linear(3, 3)})
    refuse(svdpeft.attach(stacked, svdpeft.LoRA(rank=1), ["my_fc"], train=["fc"]), "my_fc is adapted, and ends as")
    spectral = nn.ModuleDict({"s": Spectral()})
    refuse(svdpeft.attach(spectral, svdpeft.LoRA(rank=1), ["s.weight[in,out,mode]"]), "other axes than PEFT knows")
    transposed = nn.Sequential(nn.ConvTranspose2d(4, 6, 3))
    refuse(svdpeft.attach(transposed, svdpeft.LoRA(rank=1), "all"), "of kind 'conv-transpose'")
    attention = nn.MultiheadAttention(4, 2)
    refuse(svdpeft.attach(attention, svdpeft.LoRA(rank=1), ["out_proj"]), "the model reads out_proj")


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.gain = nn.Linear(3, 3), nn.Parameter(torch.ones(3))


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 2))


def test_the_nearest_update_of_a_rank_says_what_it_lacks(tmp_path):
    adapter = tuned(svdpeft.OFT(block_size=4), nn.Sequential(nn.Linear(20, 30)))
    delta = adapter.delta("0")
    found = export_lora(adapter, tmp_path / "lora", max_rank=3)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.0.lora_{side}.weight"] for side in "AB")
    u, s, vh = torch.linalg.svd(delta)
    torch.testing.assert_close(b @ a, u[:, :3] @ s[:3].diag() @ vh[:3])
    assert found.ranks == export_ranks(adapter, max_rank=3) == {"0": 3}
    assert found.lost["0"] == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-5)
    assert f"{found.lost['0']:.2%} of an update is lost, at 0" in str(found)
    assert not found.notes
    exact = export_lora(adapter, tmp_path / "exact", max_rank=40)
    assert "rank 20" in str(exact)
    assert "vLLM takes 16 at most unless it is started with --max-lora-rank 20" in str(exact)
    assert exact.lost["0"] < 1e-6
    assert "lost" not in str(exact)


def test_an_export_does_not_overwrite(tmp_path):
    adapter = tuned(svdpeft.LoRA(rank=1), Net())
    export_lora(adapter, tmp_path / "lora")
    with pytest.raises(FileExistsError, match="does not overwrite"):
        export_lora(adapter, tmp_path / "lora")
