"""TRL: supervised fine-tuning, then preferences with a second adapter on top, and no copy of the model as reference.

    python examples/trainers/trl_sft_dpo.py --out runs/trl

The reference of DPO is the same model within ``adapter.disabled()``: the base with what SFT has taught it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import svdpeft

WORDS = ["<pad>", "<eos>", "<unk>", "say", "a", "colour", "red", "blue", "green"]


def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, initializer_range=0.2, **sizes)
    )


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    steps = {"max_steps": 15, "per_device_train_batch_size": 6, "learning_rate": 3e-2, "save_strategy": "no"}
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 100}
    machine = {"use_cpu": not gpu, "bf16": gpu, "dataloader_pin_memory": gpu}
    return {"output_dir": str(folder), "max_length": 16, **steps, **quiet, **machine, **more}


class DPO(trl.DPOTrainer):
    """The reference is the model with the adapter that is trained switched off."""

    def __init__(self, adapter: svdpeft.Adapter, **settings: Any) -> None:
        self.adapter = adapter
        super().__init__(adapter.model, callbacks=[svdpeft.AdapterCallback(adapter)], **settings)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        with self.adapter.disabled():
            return super().compute_ref_log_probs(model, inputs)


def colours(model: Any, words: Any) -> str:
    """The probabilities of the three answers."""
    ids = words("say a colour", return_tensors="pt").input_ids.to(model.device)
    with torch.no_grad():
        chances = model.eval()(ids).logits[0, -1].softmax(-1).tolist()
    return ", ".join(f"{word} {chances[WORDS.index(word)]:.2f}" for word in ("red", "blue", "green"))


def main(out: Path) -> None:
    model, words = llama(), tokenizer()
    print(f"base: {colours(model, words)}")

    taught = svdpeft.attach(model, svdpeft.SORSA(rank=4), "all-linear", name="sft")
    rows = [{"prompt": "say a colour", "completion": f" {colour} <eos>"} for colour in ("red", "blue") * 6]
    trl.SFTTrainer(
        model,
        trl.SFTConfig(**settings(out / "sft")),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=words,
        callbacks=[svdpeft.AdapterCallback(taught)],
    ).train()
    after = colours(model, words)
    print(f"sft:  {after}")

    for parameter in taught.parameters():
        parameter.requires_grad_(False)  # TRL trains all that requires a gradient
    preferred = svdpeft.attach(model, svdpeft.LoRA(rank=4), "all-linear", name="dpo")  # on top of the first
    pairs = [{"prompt": "say a colour", "chosen": " blue <eos>", "rejected": " red <eos>"}] * 12
    DPO(
        preferred,
        args=trl.DPOConfig(**settings(out / "dpo"), precompute_ref_log_probs=True),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=words,
    ).train()
    print(f"dpo:  {colours(model, words)}")
    with preferred.disabled():
        assert colours(model, words) == after  # the reference is still there
    taught.save(out / "sft-adapter")
    preferred.save(out / "dpo-adapter")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/trl"))
    main(parser.parse_args().out)
