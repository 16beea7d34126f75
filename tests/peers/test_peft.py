"""Against Hugging Face PEFT, where it is installed: our exports load there, and the starts are the same."""

import copy

import pytest
import torch
from test_interop import Net, tuned
from torch import nn

import svdpeft
from svdpeft.interop.peft import export_lora

peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


@pytest.mark.parametrize("method", [svdpeft.SORSA(rank=2), svdpeft.PiSSA(rank=2), svdpeft.SVFT(), svdpeft.LoRA(rank=3)])
def test_peft_loads_an_export_and_gives_the_same(method, tmp_path):
    model, x = Net(), torch.randn(2, 3, 8, 9)
    base = copy.deepcopy(model)
    export_lora(tuned(method, model), tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    torch.testing.assert_close(theirs(x), model(x))


@pytest.mark.parametrize("rs", [False, True])
def test_lora_has_the_forward_of_peft(rs):
    base, x = nn.Sequential(nn.Linear(9, 6)), torch.randn(4, 9)
    config = peft.LoraConfig(r=4, lora_alpha=12, use_rslora=rs, target_modules=["0"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    adapter = svdpeft.attach(base, svdpeft.LoRA(rank=4, alpha=12, rs=rs))
    layer, factors = theirs.base_model.model[0], adapter.sites["0"].factors
    with torch.no_grad():
        for ours, other in ((factors.A, layer.lora_A["default"].weight), (factors.L, layer.lora_B["default"].weight)):
            ours.normal_()
            other.copy_(ours)
    torch.testing.assert_close(theirs(x), base(x))


def test_pissa_starts_at_the_factors_of_peft_up_to_sign():
    base = nn.Sequential(nn.Linear(9, 6))
    config = peft.LoraConfig(r=3, lora_alpha=3, init_lora_weights="pissa", target_modules=["0"])
    layer = peft.get_peft_model(copy.deepcopy(base), config).base_model.model[0]
    factors = svdpeft.attach(base, svdpeft.PiSSA(rank=3)).sites["0"].factors
    torch.testing.assert_close(factors.L.abs(), layer.lora_B["default"].weight.abs(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(factors.A.abs(), layer.lora_A["default"].weight.abs(), rtol=1e-4, atol=1e-5)
