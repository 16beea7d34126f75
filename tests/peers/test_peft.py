"""Against Hugging Face PEFT, where it is installed: our exports load there, and the starts are the same."""

import copy

import pytest
import torch
from test_interop import Net, tuned
from torch import nn

import svdpeft
from svdpeft.interop.peft_export import export_lora

peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


@pytest.mark.parametrize("method", [svdpeft.SORSA(rank=2), svdpeft.PiSSA(rank=2), svdpeft.SVFT(), svdpeft.LoRA(rank=3)])
def test_peft_loads_an_export_and_gives_the_same(method, tmp_path):
    model, x = Net(), torch.randn(2, 3, 8, 9)
    base = copy.deepcopy(model)
    export_lora(tuned(method, model), tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    torch.testing.assert_close(theirs(x), model(x))


class Nested(nn.Module):
    """Names that are suffixes of others, as in a ResNet: ``conv1`` is the stem, and one layer of every block."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.block = nn.ModuleDict({"conv1": nn.Conv2d(8, 8, 3), "fc": nn.Linear(4, 4)})
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.block["fc"](self.fc(self.block["conv1"](self.conv1(x)).mean((2, 3))))


@pytest.mark.parametrize("targets", [["conv1", "fc"], {r"conv1": svdpeft.LoRA(rank=3)}, [r"conv1", r"block\.conv1"]])
def test_a_name_that_is_a_suffix_of_others_means_one_layer(targets, tmp_path):
    model, x = Nested(), torch.randn(2, 3, 9, 9)
    base = copy.deepcopy(model)
    if isinstance(targets, dict):  # the stem alone
        adapter = svdpeft.attach(model, targets={r"^conv1": svdpeft.LoRA(rank=3)})
        assert list(adapter.sites) == ["conv1"]
    else:
        ranks = {"^conv1": 3, r"block\.conv1": 5, "^fc": 2, r"block\.fc": 1}
        names = [n for n in ranks if "conv" in n or targets[1] == "fc"]
        adapter = svdpeft.attach(model, svdpeft.LoRA(rank={n: ranks[n] for n in names}), names)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn_like(p))
    found = export_lora(adapter, tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    torch.testing.assert_close(theirs(x), model(x))
    adapted = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert adapted == found.keys()


def test_the_auto_class_finds_base_and_task(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=30
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=2))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
    export_lora(adapter, tmp_path / "lora")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "lora")).eval()
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits)
    assert type(theirs) is peft.PeftModelForCausalLM


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
