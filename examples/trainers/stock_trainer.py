"""``transformers.Trainer`` as it is, with ``svdpeft.AdapterCallback``: checkpoints hold the adapter alone.

    python examples/trainers/stock_trainer.py --out runs/stock

A small Llama with random weights learns to count. ``svdpeft.Trainer`` is the same without the callback.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import svdpeft


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, initializer_range=0.2, **sizes))


def counting(rows: int) -> list[dict[str, Any]]:
    ids = (torch.arange(rows)[:, None] + torch.arange(12)) % 40
    return [{"input_ids": row, "labels": row} for row in ids]


def main(out: Path) -> None:
    model: Any = llama()
    adapter = svdpeft.attach(model, svdpeft.PiSSA(rank=8), "all-linear")
    arguments = TrainingArguments(
        str(out / "training"),
        max_steps=40,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        save_steps=20,
        logging_steps=20,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(model, arguments, train_dataset=counting(32), callbacks=[svdpeft.AdapterCallback(adapter)])
    trainer.train()
    model.eval()

    fresh: Any = llama().to(model.device).eval()
    svdpeft.load(fresh, out / "training" / "checkpoint-40")
    ids = torch.tensor([[3, 4, 5, 6]], device=model.device)
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, model(ids).logits)
        print(f"after 3 4 5 6: {int(fresh(ids).logits[0, -1].argmax())}")
    files = sorted(file.name for file in (out / "training" / "checkpoint-40" / "adapter").iterdir())
    print(f"checkpoint-40/adapter: {', '.join(files)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/stock"))
    main(parser.parse_args().out)
