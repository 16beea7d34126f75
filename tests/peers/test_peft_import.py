"""A folder of the real PEFT becomes an adapter here: the same function, which trains on, merges, saves and goes back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import svdpeft
from svdpeft.interop.peft_export import export_lora

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own
IDS = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Every kind of layer that PEFT's methods know, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 8)
        self.wide, self.back = nn.Linear(8, 16), nn.Linear(16, 8)
        self.turned = Conv1D(8, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv2d(2, 8, (3, 2), stride=2, padding=1)
        self.head = nn.Linear(8, 3)
        nn.init.normal_(self.turned.weight)
        self.double().eval()

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        h = self.back(torch.tanh(self.wide(self.embed(ids))))
        h = self.norm(h + self.turned(h)).mean(1)
        return self.head(torch.tanh(h + self.conv(image).mean((2, 3))))


X = (torch.arange(12).reshape(3, 4), torch.randn(3, 2, 6, 5, generator=torch.Generator().manual_seed(2)).double())
LINEAR = ["wide", "back", "turned"]
ALL = [*LINEAR, "embed", "conv"]
LORA = peft.LoraConfig

CONFIGS = {
    "lora": LORA(r=3, lora_alpha=5, target_modules=ALL, lora_dropout=0.2),
    "rslora": LORA(r=4, lora_alpha=5, use_rslora=True, target_modules=ALL),
    "patterns": LORA(r=3, target_modules=ALL, rank_pattern={"wide": 2, "^conv": 4}, alpha_pattern={"^ba.*": 7}),
    "bias": LORA(r=2, target_modules=ALL, bias="lora_only"),
    "every bias": LORA(r=2, target_modules=LINEAR, bias="all"),
    "modules": LORA(r=2, target_modules=LINEAR, modules_to_save=["head", "norm"]),
    "rows": LORA(r=2, target_modules=LINEAR, trainable_token_indices={"embed": [7, 2, 3]}),
    "parameters": LORA(r=2, target_modules=[], target_parameters=["wide.weight"]),
    "dora": LORA(r=3, lora_alpha=5, use_dora=True, target_modules=ALL),
    "gaussian": LORA(r=3, init_lora_weights="gaussian", target_modules=ALL),
    "orthogonal": LORA(r=4, init_lora_weights="orthogonal", target_modules=LINEAR),
    "eva": LORA(r=3, init_lora_weights=False, target_modules=LINEAR),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=5, target_modules=[*LINEAR, "conv"], total_step=9),
    "vera": peft.VeraConfig(r=5, target_modules=LINEAR),
    "randlora": peft.RandLoraConfig(r=3, target_modules=LINEAR),
    "sparse": peft.RandLoraConfig(r=3, sparse=True, randlora_alpha=7, target_modules=["wide", "back"]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=["wide", "back", "embed"], use_cayley_neumann=False),
    "oft neumann": peft.OFTConfig(oft_block_size=4, target_modules=["wide", "back", "embed"]),
    "oft short": peft.OFTConfig(oft_block_size=4, target_modules=["wide", "back"], num_cayley_neumann_terms=3),
    "oft shared": peft.OFTConfig(oft_block_size=4, target_modules=["wide", "back"], block_share=True),
    "coft": peft.OFTConfig(oft_block_size=4, target_modules=["wide", "back"], coft=True, eps=0.05),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=["wide", "back"], bias="boft_only"),
    "ln": peft.LNTuningConfig(target_modules=["norm"]),
}


def trained(config: Any, model: nn.Module, seed: int = 3) -> Any:
    """PEFT's model with what it trains moved."""
    theirs = peft.get_peft_model(model, copy.deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if p.requires_grad and "ranknum" not in n:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return theirs.double() if next(model.parameters()).dtype == torch.float64 else theirs


def close(a: Tensor, b: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol / 100)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_imported_adapter_is_that_of_peft(name, tmp_path):
    base = Net()
    theirs = trained(CONFIGS[name], copy.deepcopy(base))
    theirs.save_pretrained(tmp_path / "theirs")
    want, before = theirs(*X), base(*X)
    assert (want - before).abs().max() > 1e-3
    adapter = svdpeft.import_peft(base, tmp_path / "theirs")
    rtol = 1e-7 if name == "coft" else 1e-10  # PEFT projects with the root of a number in float32
    close(base(*X), want, rtol)
    adapter.save(tmp_path / "ours")
    with adapter.disabled():
        assert torch.equal(base(*X), before)
    adapter.merge()
    close(base(*X), want, rtol)
    adapter.unmerge()
    again = svdpeft.load(Net(), tmp_path / "ours")
    assert torch.equal(again.model(*X), base(*X))
    # the same parameters train, with the same gradients up to how PEFT stores them
    theirs.zero_grad()
    loss = base(*X).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())
    optimizer = torch.optim.SGD(adapter.parameters(), 1e-4)
    optimizer.step()
    assert base(*X).square().sum() < loss


def llama(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=40, attention_bias=True, **sizes, **options)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def mixture(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.MixtralConfig(
        vocab_size=40, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, **sizes, **options
    )
    model = transformers.MixtralForCausalLM(config).double().eval()
    model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    return model


def same(make: Any, config: Any, folder: Path, rtol: float = 1e-10) -> tuple[Any, Tensor]:
    """The imported adapter, whose logits are those of PEFT."""
    theirs = trained(config, make())
    theirs.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(make(), folder).eval()
    with torch.no_grad():
        want = loaded(IDS).logits
    base = make()
    adapter = svdpeft.import_peft(base, folder)
    close(base(IDS).logits.detach(), want, rtol)
    return adapter, want


LM = ["q_proj", "down_proj"]
MODELS = {
    "embedding and head": (llama, LORA(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "tied head alone": (lambda: llama(tie_word_embeddings=True), LORA(r=2, target_modules=["lm_head", "q_proj"])),
    "tied, both": (lambda: llama(tie_word_embeddings=True), LORA(r=2, target_modules=["lm_head", "embed_tokens"])),
    "tied head saved": (
        lambda: llama(tie_word_embeddings=True),
        LORA(r=2, target_modules=LM, modules_to_save=["lm_head"]),
    ),
    "tied embedding saved": (
        lambda: llama(tie_word_embeddings=True),
        LORA(r=2, target_modules=LM, modules_to_save=["embed_tokens"]),
    ),
    "rows": (llama, LORA(r=2, target_modules=LM, trainable_token_indices=[9, 3, 4])),
    "tied rows": (
        lambda: llama(tie_word_embeddings=True),
        LORA(r=2, target_modules=LM, trainable_token_indices=[9, 3, 4]),
    ),
    "experts": (mixture, LORA(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])),
    "both of the experts": (
        mixture,
        LORA(
            r=2,
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            rank_pattern={"experts.down_proj": 3},
            alpha_pattern={"experts.gate_up_proj": 3},
        ),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name, tmp_path):
    make, config = MODELS[name]
    same(make, config, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_start_that_peft_takes_out_of_the_base(init, dora, tmp_path):
    def make() -> Any:
        return llama(torch.float32)  # PEFT's rule

    if init == "mica" and dora:
        pytest.skip("PEFT has no such method")
    config = LORA(r=3, lora_alpha=5, init_lora_weights=init, use_dora=dora, target_modules=LM)
    adapter, _ = same(make, config, tmp_path, 2e-5)
    assert {"pissa": "PiSSA", "olora": "OLoRA", "mica": "MiCA"}[init] in str(adapter.methods[0])
