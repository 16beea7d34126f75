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
    assert adapted == found.ranks.keys()


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


IDS = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(1))


def llama(**options):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=40, attention_bias=True, **sizes, **options)
    return transformers.LlamaForCausalLM(config).double().eval()


def tied():
    return llama(tie_word_embeddings=True)


def fused():
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Phi3Config(vocab_size=40, num_key_value_heads=1, pad_token_id=0, **sizes)
    return transformers.Phi3ForCausalLM(config).double().eval()


def gpt2():
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config).double().eval()


def mixture():
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=40, num_key_value_heads=1, num_local_experts=4, **sizes)
    model = transformers.MixtralForCausalLM(config).double().eval()
    model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    return model


LORA = svdpeft.LoRA(rank=2)
ATTACHED = {  # model -> what is attached, ranks of some weights
    "parts": (fused, {"method": svdpeft.PiSSA(rank=1), "targets": ["qkv_proj[q,v]"]}, {"self_attn.qkv_proj": 4}),
    "all parts": (fused, {"method": LORA, "targets": ["gate_up_proj[gate]", "qkv_proj[k]", "o_proj"]}, {}),
    "gpt2": (gpt2, {"method": LORA, "targets": ["c_attn[q]", "c_fc"]}, {"attn.c_attn": 2}),
    "experts": (
        mixture,
        {"method": LORA, "targets": ["down_proj", "gate_up_proj", "q_proj"]},
        {"experts.down_proj": 2},
    ),
    "parts of experts": (mixture, {"method": svdpeft.SORSA(rank=1), "targets": ["gate_up_proj[up]", "q_proj"]}, {}),
    "one of the experts": (mixture, {"method": LORA, "targets": ["gate_up_proj"]}, {}),
    "head": (llama, {"method": LORA, "targets": ["q_proj"], "train": ["lm_head", "model.norm"]}, {}),
    "embedding": (llama, {"method": LORA, "targets": ["q_proj", "embed_tokens"]}, {"model.embed_tokens": 2}),
    "biases": (llama, {"method": LORA, "targets": ["q_proj"], "bias": True}, {}),
    "rows": (llama, {"method": LORA, "targets": ["q_proj"], "train": {"embed_tokens": [4, 9, 5]}}, {}),
    "rows and a head": (llama, {"method": LORA, "train": {"embed_tokens": [4, 9], "lm_head": None}}, {}),
    "rows of a head": (llama, {"method": LORA, "train": {"lm_head": [4, 9, 5]}}, {"lm_head": 3}),
    "tied rows": (tied, {"method": LORA, "targets": ["q_proj"], "train": {"embed_tokens": [4, 9, 5]}}, {}),
    "tied": (tied, {"method": LORA, "targets": ["lm_head", "embed_tokens"]}, {}),
    "tied head alone": (tied, {"method": LORA, "targets": ["lm_head", "q_proj"]}, {}),
    "tied, whole": (tied, {"method": LORA, "targets": ["q_proj"], "train": ["lm_head"]}, {}),
}


@pytest.mark.parametrize("name", ATTACHED)
def test_what_is_attached_here_is_what_peft_loads(name, tmp_path):
    make, options, ranks = ATTACHED[name]
    model = make()
    adapter = svdpeft.attach(model, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    with torch.no_grad():
        want, before = model(IDS).logits, make()(IDS).logits
    assert (want - before).abs().max() > 1e-4
    found = export_lora(adapter, tmp_path / "lora")
    for layer, rank in ranks.items():
        assert {found.ranks[n] for n in found.ranks if n.endswith(layer)} == {rank}
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path / "lora")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, want, rtol=1e-9, atol=1e-11)
    again = make()
    svdpeft.import_peft(again, tmp_path / "lora")
    torch.testing.assert_close(again(IDS).logits, want, rtol=1e-9, atol=1e-11)
