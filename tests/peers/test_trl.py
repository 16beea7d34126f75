"""``AdapterCallback`` in a trainer of TRL, where it is installed: built on the stock one, with a loss of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import svdpeft

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own

WORDS = ["the", "a", "king", "queen", "went", "to", "sea", "and", "house", "of", "old", "young"]


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.LlamaConfig(**sizes, vocab_size=len(WORDS) + 3, pad_token_id=0, eos_token_id=1)
    return transformers.LlamaForCausalLM(config)


def train(folder: Path, batch: int = 4, accumulation: int = 1, resume: str | None = None) -> Any:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    words = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    generator = torch.Generator().manual_seed(0)
    rows = [[WORDS[i] for i in torch.randint(len(WORDS), (8,), generator=generator)] for _ in range(24)]
    adapter = svdpeft.attach(llama(), svdpeft.SORSA(rank=2, gamma=0.05, mode="loss"), ["q_proj"])
    args = trl.SFTConfig(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=0.0,
        max_length=16,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = trl.SFTTrainer(
        model=adapter.model,
        args=args,
        train_dataset=datasets.Dataset.from_list([{"text": " ".join(row)} for row in rows]),
        processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **words),
        callbacks=[svdpeft.AdapterCallback(adapter)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return adapter, trainer


def test_supervised_fine_tuning(tmp_path: Path):
    """Whole, resumed and accumulated it ends at the same values; what it saves is the adapter."""
    adapter, trainer = train(tmp_path / "one")
    resumed, _ = train(tmp_path / "one", resume=str(tmp_path / "one" / "checkpoint-2"))
    accumulated, _ = train(tmp_path / "two", batch=2, accumulation=2)
    start = svdpeft.attach(llama(), svdpeft.SORSA(rank=2), ["q_proj"])
    for one, two, three, before in zip(*(a.parameters() for a in (adapter, resumed, accumulated, start)), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, three)
        assert not torch.equal(one, before)
    trainer.save_model(str(tmp_path / "final"))
    assert {"README.md", "adapter"} <= {file.name for file in (tmp_path / "final").iterdir()}
    assert not list((tmp_path / "final").glob("*.safetensors"))
    fresh, ids = llama().eval(), torch.arange(3, 9)[None]
    svdpeft.load(fresh, tmp_path / "final")
    assert torch.equal(fresh(ids).logits, adapter.model.eval()(ids).logits)
