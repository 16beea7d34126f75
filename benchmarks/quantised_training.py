"""SmolLM2-135M in NF4: SORSA and QSORSA here, QLoRA of Hugging Face PEFT, on the same batches, step by step in turn.

    python -m benchmarks.quantised_training [--steps 8] [--rank 16]

Every step runs every candidate once, in an order that changes, and a candidate's time is the median over steps of its
ratio to PEFT's in the same step. All have their own copy of the same quantised weights, but QSORSA, which quantises
what its factors leave. Memory is measured as in benchmarks/plan.py, each candidate in a process of its own. Writes
benchmarks/results/quantised-training.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
import transformers

import svdpeft
from benchmarks.plan import allocated_by, in_its_own_process
from svdpeft.models import load
from svdpeft.registry import TASKS
from svdpeft.training.memory import peak_memory, reset_peak_memory

OUT = Path(__file__).parent / "results" / "quantised-training.md"
NAME = "smollm2-135m"
RATES = {"QLoRA, PEFT": 1e-3, "QLoRA": 1e-3, "SORSA on NF4": 2e-4, "QSORSA, 1 iteration": 2e-4}


def prepared() -> tuple[torch.nn.Module, Callable[[int], Any]]:
    """The base in float32, and the batches by step."""
    torch.manual_seed(0)
    loaded = load(NAME)
    task: Any = TASKS["wordproblems"]()
    data = task.prepare(loaded, seed=0, splits=("train",))
    return loaded.model, lambda step: data.collate([data.train[i % len(data.train)] for i in (2 * step, 2 * step + 1)])


def quantise(name: str, model: torch.nn.Module) -> torch.nn.Module:
    """The base of a candidate: in NF4, but for QSORSA, which quantises what its factors leave."""
    if not name.startswith("QSORSA"):
        svdpeft.quantize(model, scheme="nf4", iterations=0, nuclear=False)
    return model


def build(name: str, model: Any, rank: int) -> tuple[torch.nn.Module, Any]:
    """A candidate's model and its adapter, if it is one of ours."""
    if name.endswith("PEFT"):
        return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")), None
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=rank) if name == "QLoRA" else svdpeft.SORSA(rank=rank))
    if name.startswith("QSORSA"):
        svdpeft.quantize(model, adapter, "nf4", iterations=1, nuclear=False)
    return model, adapter


def optimizer_of(model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)


def train(model: Any, adapter: Any, optimizer: torch.optim.Optimizer, batch: Any, rate: float, steps: int) -> float:
    """One step; its loss."""
    loss = model.train()(**batch).loss
    loss.backward()
    if adapter is not None:
        adapter.before_step(rate, steps)
    optimizer.step()
    if adapter is not None:
        adapter.after_step()
    optimizer.zero_grad()
    return float(loss.detach())


def measure(name: str, rank: int) -> dict[str, int]:
    """Bytes of a candidate's third step, all of the same batch."""
    nothing = reset_peak_memory()
    loaded, batches = prepared()
    base = copy.deepcopy(loaded)  # what stays of the other is a map of its file, whose pages would count
    del loaded
    model, adapter = build(name, quantise(name, base), rank)
    batch, optimizer = batches(0), optimizer_of(model, RATES[name])

    def step() -> None:
        train(model, adapter, optimizer, batch, RATES[name], 3)

    step()
    step()
    before = reset_peak_memory()
    step()
    return {"model": before - nothing, "step": peak_memory() - before, "allocated": allocated_by(step)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--memory", choices=list(RATES), help="measure the memory of this one here, and print it")
    options = parser.parse_args()
    if options.memory:
        print(json.dumps(measure(options.memory, options.rank)))
        return
    plain, batches = prepared()
    loaded = quantise("all", copy.deepcopy(plain))
    bases = {name: plain if name.startswith("QSORSA") else copy.deepcopy(loaded) for name in RATES}
    runs = {name: build(name, base, options.rank) for name, base in bases.items()}
    losses: dict[str, list[float]] = {name: [] for name in RATES}
    seconds: dict[str, list[float]] = {name: [] for name in RATES}
    optimizers = {name: optimizer_of(model, RATES[name]) for name, (model, _) in runs.items()}
    for step in range(options.steps):
        batch, names = batches(step), list(RATES)
        for name in names[step % 4 :] + names[: step % 4]:
            (model, adapter), optimizer = runs[name], optimizers[name]
            started = time.perf_counter()
            losses[name].append(train(model, adapter, optimizer, batch, RATES[name], options.steps))
            seconds[name].append(time.perf_counter() - started)
        print(step, {name: round(each[-1], 4) for name, each in losses.items()}, flush=True)
    lines = [
        f"# SmolLM2-135M in NF4, rank {options.rank}, {options.steps} steps of 2 word problems\n",
        "Ratio: the median over the steps of the step time to PEFT's in the same step, the first left out. Memory in",
        "MiB, of the third step of a process of its own. Model: resident before the step, beyond what the process had",
        "before it loaded anything (weights, factors, AdamW's averages). Step: the most that it takes beyond that",
        "(activations, gradients), resident and by torch's allocator. Peak: model and step, resident.\n",
        "| candidate | rate | loss: first step | middle | last | ratio of step time (min to max) | median s | model "
        "| step, resident | step, allocated | peak |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, each in losses.items():
        ratios = [mine / its for mine, its in zip(seconds[name][1:], seconds["QLoRA, PEFT"][1:], strict=True)]
        memory = in_its_own_process("quantised_training", "--memory", name, "--rank", str(options.rank))
        print(name, memory, flush=True)
        sizes = (memory["model"], memory["step"], memory["allocated"], memory["model"] + memory["step"])
        told_sizes = " | ".join(f"{size / 2**20:,.0f}" for size in sizes)
        told = f"{each[0]:.3f} | {each[len(each) // 2]:.3f} | {each[-1]:.3f}"
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        median = statistics.median(seconds[name][1:])
        lines.append(f"| {name} | {RATES[name]:g} | {told} | {spread} | {median:.2f} | {told_sizes} |")
    base = sum(p.numel() * p.element_size() for p in loaded.parameters()) / 2**20
    scales = sum(m.weight.quant_state.absmax.nbytes for m in loaded.modules() if hasattr(m, "quant_state")) / 2**20
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft, bitsandbytes))
    lines += [
        f"\nThe base itself: {base:.0f} MiB and {scales:.0f} MiB of scales; in float32 {4 * 134.5e6 / 2**20:.0f} MiB.",
        "A handful of steps is no training: the rates differ, and the losses say nothing of which is better.\n",
        f"`python -m benchmarks.quantised_training --steps {options.steps}`, {date.today()};",
        f"{torch.get_num_threads()} threads of a shared {platform.machine()} machine without a GPU;",
        f"Python {platform.python_version()}, {versions}.",
    ]
    OUT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
