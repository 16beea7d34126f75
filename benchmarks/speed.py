"""Forward and backward of SmolLM2-135M under each method, against Hugging Face PEFT's LoRA in the same run.

    pip install peft
    python benchmarks/speed.py [--rank 32] [--rounds 7] [--device cuda --dtype bfloat16]

Interleaved: every round runs every candidate once, and a candidate's figure is the median over rounds of its ratio to
PEFT's LoRA in the same round. Absolute seconds on a shared machine mean little. Dropout is 0 everywhere; the base is
frozen; all linear layers but the head are adapted.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable

import torch

import svdpeft
from svdpeft.models import load


def candidates(rank: int) -> dict[str, tuple[svdpeft.Method, bool]]:
    """Name -> method, and whether the site is folded."""
    sorsa = svdpeft.SORSA(rank=rank)
    return {
        "svdpeft LoRA": (svdpeft.LoRA(rank=rank), False),
        "svdpeft PiSSA": (svdpeft.PiSSA(rank=rank), False),
        "svdpeft SORSA": (sorsa, False),
        "svdpeft SORSA, folded": (sorsa, True),
        "svdpeft SVFT plain": (svdpeft.SVFT(), False),
        "svdpeft SVFT banded": (svdpeft.SVFT(pattern="banded"), False),
        "svdpeft SVFT banded, folded": (svdpeft.SVFT(pattern="banded"), True),
    }


def build(base: torch.nn.Module, name: str, rank: int) -> torch.nn.Module:
    """Return an adapted copy of the base, moved off its start."""
    model = copy.deepcopy(base)
    if name == "peft LoRA":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    if name != "frozen base":
        method, folded = candidates(rank)[name]
        adapter = svdpeft.attach(model, method)
        if folded:
            adapter.fold()
    else:
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(2)
    base = load("smollm2-135m", dtype=getattr(torch, options.dtype)).model.to(options.device)
    base.train()
    ids = torch.randint(0, 40_000, (options.batch, options.tokens), device=options.device)

    def step(model: torch.nn.Module) -> float:
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    names = ["peft LoRA", "frozen base", *candidates(options.rank)]
    models = {name: build(base, name, options.rank) for name in names}
    run: Callable[[], dict[str, float]] = lambda: {name: step(model) for name, model in models.items()}  # noqa: E731
    run()  # warm-up
    rounds = [run() for _ in range(options.rounds)]
    print(f"{platform.platform()}, torch {torch.__version__}, {options}")
    print("| candidate | ratio to PEFT's LoRA: median (min to max) | median s |\n| --- | ---: | ---: |")
    for name in names:
        ratios = [r[name] / r["peft LoRA"] for r in rounds]
        seconds = statistics.median(r[name] for r in rounds)
        print(f"| {name} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {seconds:.2f} |")


if __name__ == "__main__":
    main()
