"""A compiled model is compiled once: steps of an optimizer, of a method and of a schedule make no new graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from svdpeft import SORSA, SVFT, DoRA, LoRA, PiSSA, attach
from svdpeft.methods.base import Method

STARTS = [PiSSA(rank=2), SORSA(rank=2), SVFT(), SVFT(pattern="banded")]  # that folding takes out of the weight
ROWS = [*((m, fold) for m in STARTS for fold in (False, True)), *((m, False) for m in (LoRA(2), DoRA(LoRA(2))))]


def step(model: Any, adapter: Any, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
    loss = model(x).square().mean()
    penalty = adapter.penalty()
    (loss if penalty is None else loss + penalty).backward()
    adapter.before_step(1e-2, 10)
    optimizer.step()
    adapter.after_step(0.5)
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize(("method", "fold"), ROWS, ids=lambda v: str(v) if isinstance(v, Method) else f"fold={v}")
def test_no_step_compiles_again(method: Method, fold: bool):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 12))
    adapter = attach(model, method, targets="all-linear")
    if fold:
        adapter.fold()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = [step(compiled, adapter, optimizer, torch.randn(4, 12)) for _ in range(2)]
    graphs = counters["stats"]["unique_graphs"]
    assert graphs
    losses += [step(compiled, adapter, optimizer, torch.randn(4, 12)) for _ in range(4)]
    assert counters["stats"]["unique_graphs"] == graphs
    assert len(set(losses)) == len(losses), "it trains"
