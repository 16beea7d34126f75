"""Models that transformers has loaded quantised: adapted, trained by its own trainer, saved; PEFT's LoRA on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from helpers import perturb
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import svdpeft
from svdpeft import SORSA, LoRA, attach, load
from svdpeft.layers.quantised import form_of

CONFIGS: dict[str, Any] = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao int4": TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(32))),
}
every_config = pytest.mark.parametrize("name", CONFIGS)
IDS = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(path := tmp_path_factory.mktemp("base"))
    return path


def loaded(folder: Path, name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIGS[name], dtype=torch.float32)


@every_config
def test_adapted_trained_by_the_stock_trainer_and_saved(folder: Path, name: str, tmp_path: Path):
    model = loaded(folder, name).train()
    base = model(IDS).logits
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model=model, args=transformers.TrainingArguments(tmp_path, report_to="none"))
    adapter = attach(model, SORSA(rank=4))
    assert len(adapter.sites) == 14
    assert torch.equal(model(IDS).logits, base)
    data = [{"input_ids": row, "labels": row} for row in IDS]
    args = transformers.TrainingArguments(
        tmp_path / "run",
        max_steps=3,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer = transformers.Trainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=[svdpeft.AdapterCallback(adapter)]
    )
    trainer.train()
    found = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert found[-1] < found[0]
    adapter.save(tmp_path / "adapter")
    out = model.train()(IDS).logits
    adapter.detach()
    assert not getattr(model, "_hf_peft_config_loaded", False)
    again = loaded(folder, name).train()
    load(again, tmp_path / "adapter")
    torch.testing.assert_close(again(IDS).logits, out, rtol=1e-2, atol=1e-2)  # an evaluation may have rounded scales


@every_config
def test_merged_it_is_saved_as_a_plain_model(folder: Path, name: str, tmp_path: Path):
    model = loaded(folder, name).train()
    adapter = attach(model, LoRA(rank=2))
    perturb(adapter)
    out = model(IDS).logits
    adapter.merge(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(plain(IDS).logits, out, rtol=1e-4, atol=1e-4)
    assert not hasattr(plain.config, "quantization_config")
    adapter.unmerge()
    assert torch.equal(model(IDS).logits, out)
    assert model.config.quantization_config is not None


@pytest.mark.parametrize("scheme", ["nf4", "int8", "torchao-int8", "torchao-int4"])
def test_quantised_here_it_is_loaded_there(folder: Path, scheme: str, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    adapter = attach(model, svdpeft.PiSSA(rank=8))
    svdpeft.quantize(model, adapter, scheme, iterations=2, nuclear=False)
    adapter.save(tmp_path / "adapter")
    out = model(IDS).logits
    with adapter.disabled():
        model.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).train()
    assert form_of(again.model.layers[0].mlp.up_proj, "weight").scheme is not None
    load(again, tmp_path / "adapter")
    torch.testing.assert_close(again(IDS).logits, out)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_the_lora_of_peft_with_the_same_factors(folder: Path, name: str):
    model = loaded(folder, name).train()
    adapter = attach(model, LoRA(rank=4, alpha=8))
    perturb(adapter)
    ours = model(IDS).logits
    ours.square().sum().backward()
    theirs: Any = peft.get_peft_model(
        loaded(folder, name), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0)
    ).train()
    pairs = []
    for site, it in adapter.sites.items():
        layer = theirs.get_submodule(f"base_model.model.{site}")
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a.data.copy_(it.factors.A)
        b.data.copy_(it.factors.L)
        pairs += [(a, it.factors.A), (b, it.factors.L)]
    out = theirs(IDS).logits
    torch.testing.assert_close(out, ours, rtol=1e-4, atol=1e-4)
    out.square().sum().backward()
    for their, our in pairs:
        torch.testing.assert_close(their.grad, our.grad, rtol=1e-3, atol=1e-3 * float(our.grad.abs().max()))
