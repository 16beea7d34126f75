"""``plan`` beside trainings that happen: the memory of a step, and the time to attach.

    python -m benchmarks.plan [--threads 2]

Each case runs in a process of its own: two steps of AdamW on the CPU, of which the second is measured, by torch's
allocator and by the resident memory of the process; before it, the time of ``attach``. glibc is told to give every
block above 64 KiB back at once, so that the resident memory is what is in use.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "plan.md"
CASES = [
    ("smollm2-135m", "lora:rank=16", {"batch_size": 4, "length": 128}),
    ("smollm2-135m", "pissa:rank=16", {"batch_size": 4, "length": 256}),
    ("smollm2-135m", "sorsa:rank=16", {"batch_size": 4, "length": 128, "dtype": "bfloat16"}),
    ("smollm2-135m", "svft:pattern=banded", {"batch_size": 4, "length": 128}),
    ("smollm2-135m", "lora:rank=16", {"batch_size": 4, "length": 256, "checkpoint_activations": True}),
    ("minilm-l6", "lora:rank=16", {"batch_size": 16, "length": 128, "num_classes": 3}),
    ("dinov2-vits14", "pissa:rank=16", {"batch_size": 8, "image_size": 224, "num_classes": 10}),
    ("dinov2-vits14", "oft", {"batch_size": 16, "image_size": 98, "num_classes": 10}),
    ("efficientnet-lite0", "pissa:rank=8", {"batch_size": 8, "image_size": 224, "num_classes": 10}),
]
RECIPE = ("batch_size", "checkpoint_activations")
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure(model: str, method: str, options: dict[str, Any], threads: int) -> dict[str, float]:
    """Plan it, then do it."""
    import torch

    import svdpeft
    from svdpeft.finetuning.order import read_method
    from svdpeft.finetuning.plan import _batch, plan
    from svdpeft.finetuning.session import call, loss, recompute
    from svdpeft.training.memory import peak_memory, reset_peak_memory
    from svdpeft.training.recipe import Recipe

    torch.set_num_threads(threads)
    recipe = Recipe(lr=1e-4, **{name: value for name, value in options.items() if name in RECIPE})
    more = {name: value for name, value in options.items() if name not in RECIPE}
    planned = plan(model, read_method(method), recipe, **more)
    length, dtype = more.pop("length", 512), getattr(torch, more.pop("dtype", "float32"))
    loaded = svdpeft.models.load(model, dtype=dtype, **more)
    base = loaded.model
    new = [loaded.head] if loaded.head and "num_classes" in more else []
    started = time.perf_counter()
    adapter = svdpeft.attach(base, read_method(method), train=[*loaded.fresh, *new], clip_rank=True)
    attached = time.perf_counter() - started
    if recipe.checkpoint_activations:
        recompute(base)
    batch = {name: torch.ones_like(t) for name, t in _batch(loaded, recipe.batch_size, length, dtype).items()}
    if "attention_mask" in batch:
        batch["attention_mask"][0, -1] = 0
    optimizer = torch.optim.AdamW(adapter.parameters(), fused=True)
    base.train()

    def step() -> None:
        value, penalty = loss(call(base, batch), batch), adapter.penalty()
        (value if penalty is None else value + penalty).backward()
        adapter.before_step(recipe.lr, 10)
        optimizer.step()
        adapter.after_step(1.0)
        optimizer.zero_grad()

    step()
    before = reset_peak_memory()
    step()
    resident = peak_memory() - before
    allocated = allocated_by(step)
    seconds = planned.attach_seconds or 0.0
    return {
        "planned": planned.memory.step,
        "allocated": allocated,
        "resident": resident,
        "attach_planned": seconds,
        "attached": attached,
    }


def allocated_by(step: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator has given out within a call, beyond those before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def in_its_own_process(module: str, *options: str) -> Any:
    """What a benchmark prints last, as JSON, in a process in which glibc gives every block back at once."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *options]
    done = subprocess.run(command, env={**os.environ, **GLIBC}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[tuple[str, str, dict[str, Any], dict[str, float]]], threads: int) -> str:
    """The result as a page."""
    import torch
    import transformers

    lines = [
        "# `svdpeft plan` beside what happens",
        "",
        f"`python -m benchmarks.plan`, {date.today()}, {platform.machine()}, {threads} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}. One run each. *step*: the most bytes in use "
        "within a training step beyond weights, factors and the optimizer's averages, in MiB; *allocated* by torch's "
        "profiler, *resident* by the process. *attach*: seconds.",
        "",
        "| model | method | options | step planned | allocated | resident | planned / allocated | planned / resident "
        "| attach planned | attached |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, method, options, found in rows:
        planned, allocated, resident = (found[name] / 2**20 for name in ("planned", "allocated", "resident"))
        told = ", ".join(f"{name}={value}" for name, value in options.items())
        lines.append(
            f"| {model} | {method} | {told} | {planned:,.1f} | {allocated:,.1f} | {resident:,.1f} | "
            f"{planned / allocated:.2f} | {planned / resident:.2f} | {found['attach_planned']:.2f} | "
            f"{found['attached']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", type=int, help="measure this one here, and print it")
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(measure(*CASES[args.case], args.threads)))
        return
    rows = []
    for number, case in enumerate(CASES):
        found = in_its_own_process("plan", "--case", str(number), "--threads", str(args.threads))
        rows.append((*case, found))
        print(*rows[-1], flush=True)
    RESULT.write_text(table(rows, args.threads))


if __name__ == "__main__":
    main()
