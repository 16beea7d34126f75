"""Serve an adapter: as a LoRA for PEFT and vLLM, and as a file for llama.cpp.

    python examples/serve.py --adapter my-adapter --out runs/serve

Without ``--adapter`` one with random values is made for smollm2-135m. PEFT's part is run and held against the adapted
model; of vLLM and llama.cpp the commands are printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from shell import run

import svdpeft


def draw(model: Any, folder: Path) -> Path:
    adapter = svdpeft.attach(model, svdpeft.SORSA(rank=8), ["q_proj"])
    torch.manual_seed(0)
    with torch.no_grad():  # the training
        for parameter in adapter.parameters():
            parameter += 0.01 * parameter.std() * torch.randn_like(parameter)
    adapter.save(folder)
    adapter.detach()
    return folder


def main(adapter: Path | None, base: str, out: Path) -> None:
    loaded = svdpeft.models.load(base)
    adapter = draw(loaded.model, out / "adapter") if adapter is None else adapter
    run(f"svdpeft export {adapter} {out / 'lora'} --to peft --max-rank 16 --base {base}")
    run(f"svdpeft export {adapter} {out / 'adapter.gguf'} --to gguf --base {base}")

    ids = loaded.processor("The tide", return_tensors="pt").input_ids
    with torch.no_grad():
        attached = svdpeft.load(loaded.model, adapter)
        ours = loaded.model(ids).logits
        attached.detach()
        before = loaded.model(ids).logits
        theirs = PeftModel.from_pretrained(loaded.model, out / "lora").eval()(ids).logits
    change, off = (ours - before).abs().max(), (ours - theirs).abs().max()
    print(f"PEFT: logits differ by at most {float(off):.1e}, where the adapter changes them by {float(change):.1e}")

    print(f"vLLM:      vllm serve BASE --enable-lora --max-lora-rank 16 --lora-modules mine={out / 'lora'}")
    print(f"llama.cpp: llama-server -m BASE.gguf --lora {out / 'adapter.gguf'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("runs/serve"))
    given = parser.parse_args()
    main(given.adapter, given.base, given.out)
