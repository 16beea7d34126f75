"""What a step asks of a device beside its time: memory, synchronisations; and whether it can be compiled and captured.

    python -m benchmarks.speed.device [--model 7b:2] [--device cuda] [--dtype bfloat16] [--rank 128]

A synchronisation is a value that the program waits for. Those of the base are its own; an adapter adds none.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import svdpeft
from benchmarks.speed.models import Bench, copied, peft

ASKED = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero")  # what makes a program wait for a value


def methods(rank: int) -> dict[str, svdpeft.Method | None]:
    """Name -> method; ``None`` is PEFT's LoRA."""
    return {
        "peft LoRA": None,
        "LoRA": svdpeft.LoRA(rank=rank),
        "PiSSA": svdpeft.PiSSA(rank=rank),
        "SORSA": svdpeft.SORSA(rank=rank, gamma=4e-4),
        "SVFT banded": svdpeft.SVFT(pattern="banded"),
    }


def looked_at(bench: Bench, base: nn.Module, method: svdpeft.Method | None) -> dict[str, Any]:
    """Train two steps, and say what the second one took."""
    model = copied(base)
    if method is None:
        model, adapter = peft(model, "peft LoRA", bench.rank), None
    else:
        adapter = svdpeft.attach(model, method)
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trains, fused=True)
    ids = bench.ids()
    context = functools.partial(torch.autocast, bench.device, bench.dtype, enabled=bench.dtype != torch.float32)

    def step() -> None:
        with context():
            loss = model(input_ids=ids, labels=ids).loss
        penalty = None if adapter is None else adapter.penalty()
        (loss if penalty is None else loss + penalty).backward()
        if adapter is not None:
            adapter.before_step(1e-4, 10)
        optimizer.step()
        if adapter is not None:
            adapter.after_step(1.0)
        optimizer.zero_grad()

    step()
    found: dict[str, Any] = {"trains": sum(parameter.numel() for parameter in trains)}
    if bench.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        found["peak, GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.device == "cuda" else [])]
    with profile(activities=activities) as seen:
        step()
    found["values waited for"] = sum(event.count for event in seen.key_averages() if event.key in ASKED)
    found["synchronisations"] = sum(e.count for e in seen.key_averages() if e.key.startswith("cudaStreamSynchronize"))
    if adapter is not None:
        found["compiled"] = _tried(lambda: compiled(model, ids))
        if bench.device == "cuda":
            found["captured"] = _tried(lambda: captured(model, adapter, ids))
    return found


@torch.no_grad()
def compiled(model: nn.Module, ids: torch.Tensor) -> str:
    """The whole model in one graph, beside eager."""
    model.eval()
    expected = model(input_ids=ids).logits
    out = torch.compile(lambda x: model(input_ids=x).logits, fullgraph=True)(ids)
    model.train()
    return f"differs by {float((out - expected).abs().max() / expected.abs().max()):.1e} of the largest logit"


@torch.no_grad()
def captured(model: nn.Module, adapter: svdpeft.Adapter, ids: torch.Tensor) -> str:
    """A CUDA graph of the forward goes on being right after other values were swapped in."""
    model.eval()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(input_ids=ids)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(input_ids=ids).logits
    state = adapter.state_dict()
    for tensor in state.tensors.values():
        if tensor.is_floating_point():
            tensor.mul_(1.01)
    adapter.load_state_dict(state)
    graph.replay()
    expected = model(input_ids=ids).logits
    model.train()
    return f"differs by {float((out - expected).abs().max() / expected.abs().max()):.1e} of the largest logit"


def _tried(try_it: Callable[[], str]) -> str:
    """What came of it; one failure does not end the others, for which a GPU is at hand now."""
    try:
        return try_it()
    except Exception as error:
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bench = Bench(
        options.model, options.device, getattr(torch, options.dtype), options.rank, options.batch, options.tokens
    )
    base, found = bench.base(), {}
    for name, method in methods(options.rank).items():
        found[name] = looked_at(bench, base, method)
        print(name, json.dumps(found[name]), flush=True)
        torch._dynamo.reset()
        gc.collect()
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
