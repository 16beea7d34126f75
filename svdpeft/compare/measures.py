"""What a comparison measures besides the metric: is the merge exact, the file, how far is the model from its base?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from svdpeft.adapter.adapter import Adapter
from svdpeft.tasks.base import TaskData

EXAMPLES = 4  # on which two states of a model are compared
PART = 2**20  # values of a weight that are widened to float64 at once


@torch.no_grad()
def outputs(model: nn.Module, data: TaskData) -> Tensor:
    """Return the outputs on the first training examples, in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    batch = data.collate([data.train[i] for i in range(min(EXAMPLES, len(data.train)))])  # type: ignore[arg-type]
    y = model(**{name: value.to(device) for name, value in batch.items() if name != "labels"})
    return (y if isinstance(y, Tensor) else y.logits).float()


def gap(y: Tensor, reference: Tensor) -> float:
    """Return max|y − reference| / max|reference|, example by example: logits of a large vocabulary are large."""
    apart = torch.stack([(one - other).abs_().max() for one, other in zip(y, reference, strict=True)])
    return float(apart.max() / torch.stack(reference.aminmax()).abs().max())


def merge_error(model: nn.Module, adapter: Adapter, data: TaskData) -> float:
    """Return max|y_merged − y_adapted| / max|y_adapted|; the adapter is as it was afterwards."""
    adapted = outputs(model, data)
    adapter.merge()
    error = gap(outputs(model, data), adapted)
    adapter.unmerge()
    return error


@torch.no_grad()
def distance(model: nn.Module, base: nn.Module, head: Sequence[str] = ()) -> float:
    """Return ‖W' − W‖_F / ‖W‖_F over all parameters but a new head's.

    Args:
        model: with merged weights.
        base: the pretrained one.
        head: names of the modules that are new.
    """
    before = dict(base.named_parameters())
    squares = torch.zeros(2, dtype=torch.float64)
    for name, now in model.named_parameters():
        if not any(name.startswith(f"{module}.") for module in head):
            then = before[name].to(now.device)
            for new, old in zip(now.reshape(-1).split(PART), then.reshape(-1).split(PART), strict=True):
                squares += torch.stack([(new - old).double().square().sum(), old.double().square().sum()]).cpu()
    changed, whole = squares.sqrt().tolist()
    return changed / whole


def units_per_example(data: TaskData) -> tuple[str, float]:
    """Return what a throughput counts: ``("images", 1)``, or ``("tokens", their mean number per example)``."""
    train: Any = data.train
    if "input_ids" not in train[0]:
        return "images", 1.0
    return "tokens", sum(len(train[i]["input_ids"]) for i in range(len(train))) / len(train)
