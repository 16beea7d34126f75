"""An RWKV file in the official layout: train an adapter, merge it, and write a file that BlinkDL's code loads.

    python examples/rwkv_file.py --model RWKV-x070-World-0.1B.pth --data own.jsonl --out runs/rwkv

Without them a small RWKV-4 with random weights and a few lines of text are written. RWKV-6 and RWKV-7 want
``pip install "svdpeft[rwkv]"``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from shell import run
from transformers import RwkvConfig, RwkvForCausalLM

import svdpeft


def write(folder: Path) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(vocab_size=256, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2))
    svdpeft.models.rwkv.write(model, folder / "base.pth")
    (folder / "lines.txt").write_text("".join(f"the tide comes in at {i} and goes out at {i + 6}\n" for i in range(24)))
    return folder / "base.pth", folder / "lines.txt"


def main(model: Path | None, data: Path | None, out: Path) -> None:
    drawn, lines = write(out) if model is None or data is None else (model, data)
    model, data = model or drawn, data or lines
    run(
        f"svdpeft train --model {model} --data {data} --method sorsa:rank=4 --targets rwkv --lr 1e-2 --epochs 4 "
        f"--length 64 --out {out / 'adapter'}"
    )
    loaded = svdpeft.models.load(str(model))
    adapter = svdpeft.load(loaded.model, out / "adapter")
    print(adapter.merge(permanent=True))
    svdpeft.models.rwkv.write(loaded.model, out / "merged.pth")
    names = {path: set(torch.load(path, weights_only=True)) for path in (model, out / "merged.pth")}
    assert names[model] == names[out / "merged.pth"]
    print(f"{out / 'merged.pth'}: the {len(names[model])} tensors of the base, by their names")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/rwkv"))
    given = parser.parse_args()
    main(given.model, given.data, given.out)
