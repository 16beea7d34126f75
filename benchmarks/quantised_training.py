"""SmolLM2-135M in NF4: SORSA and QSORSA here, QLoRA of Hugging Face PEFT, on the same batches, step by step in turn.

    python -m benchmarks.quantised_training [--steps 8] [--rank 16]

Every step runs every candidate once, in an order that changes, and a candidate's time is the median over steps of its
ratio to PEFT's in the same step. All have their own copy of the same quantised weights, but QSORSA, which quantises
what its factors leave. Writes benchmarks/results/quantised-training.md.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
import transformers

import svdpeft
from svdpeft.models import load
from svdpeft.registry import TASKS

OUT = Path(__file__).parent / "results" / "quantised-training.md"
NAME = "smollm2-135m"
RATES = {"QLoRA, PEFT": 1e-3, "QLoRA": 1e-3, "SORSA on NF4": 2e-4, "QSORSA, 1 iteration": 2e-4}


def build(name: str, quantised: torch.nn.Module, rank: int) -> tuple[torch.nn.Module, Any]:
    """A model and its adapter, if it is one of ours."""
    if name.startswith("QSORSA"):
        model = load(NAME).model
        adapter = svdpeft.attach(model, svdpeft.SORSA(rank=rank))
        svdpeft.quantize(model, adapter, "nf4", iterations=1, nuclear=False)
        return model, adapter
    model = copy.deepcopy(quantised)
    if name.endswith("PEFT"):
        return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")), None
    return model, svdpeft.attach(model, svdpeft.LoRA(rank=rank) if name == "QLoRA" else svdpeft.SORSA(rank=rank))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    torch.manual_seed(0)
    loaded = load(NAME)
    task: Any = TASKS["wordproblems"]()
    data = task.prepare(loaded, seed=0, splits=("train",))
    svdpeft.quantize(loaded.model, scheme="nf4", iterations=0, nuclear=False)
    runs = {name: build(name, loaded.model, options.rank) for name in RATES}
    losses: dict[str, list[float]] = {name: [] for name in RATES}
    seconds: dict[str, list[float]] = {name: [] for name in RATES}
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATES[name], weight_decay=0.0)
        for name, (model, _) in runs.items()
    }
    for step in range(options.steps):
        batch = data.collate([data.train[i % len(data.train)] for i in range(2 * step, 2 * step + 2)])
        names = list(RATES)
        for name in names[step % 4 :] + names[: step % 4]:
            (model, adapter), optimizer = runs[name], optimizers[name]
            started = time.perf_counter()
            loss = model.train()(**batch).loss
            loss.backward()
            if adapter is not None:
                adapter.before_step(RATES[name], options.steps)
            optimizer.step()
            if adapter is not None:
                adapter.after_step()
            optimizer.zero_grad()
            seconds[name].append(time.perf_counter() - started)
            losses[name].append(float(loss.detach()))
        print(step, {name: round(each[-1], 4) for name, each in losses.items()}, flush=True)
    lines = [
        f"# SmolLM2-135M in NF4, rank {options.rank}, {options.steps} steps of 2 word problems\n",
        "Ratio: the median over the steps of the step time to PEFT's in the same step, the first left out. MiB: what",
        "the factors take, those that train and the start that a method keeps, with gradients and AdamW's averages.\n",
        "| candidate | rate | loss: first step | middle | last | ratio of step time (min to max) | median s | MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, each in losses.items():
        ratios = [mine / its for mine, its in zip(seconds[name][1:], seconds["QLoRA, PEFT"][1:], strict=True)]
        model, _ = runs[name]
        beside = [p for n, p in model.named_parameters() if "lora_" in n or ".svdpeft." in n]
        size = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in beside) / 2**20
        told = f"{each[0]:.3f} | {each[len(each) // 2]:.3f} | {each[-1]:.3f}"
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        median = statistics.median(seconds[name][1:])
        lines.append(f"| {name} | {RATES[name]:g} | {told} | {spread} | {median:.2f} | {size:.1f} |")
    base = sum(p.numel() * p.element_size() for p in loaded.model.parameters()) / 2**20
    scales = (
        sum(m.weight.quant_state.absmax.nbytes for m in loaded.model.modules() if hasattr(m, "quant_state")) / 2**20
    )
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft, bitsandbytes))
    lines += [
        f"\nThe base itself: {base:.0f} MiB and {scales:.0f} MiB of scales; in float32 {4 * 134.5e6 / 2**20:.0f} MiB.",
        "A handful of steps is no training: the rates differ, and the losses say nothing of which is better.\n",
        f"`python -m benchmarks.quantised_training --steps {options.steps}`; {torch.get_num_threads()} threads of a",
        f"shared {platform.machine()} machine without a GPU; Python {platform.python_version()}, {versions}.",
    ]
    OUT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
