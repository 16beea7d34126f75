"""A task, and a model for it: which side of a plane a point is on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from svdpeft.registry import TASKS
from svdpeft.tasks.base import SPLITS, Task, TaskData, evaluating


def net(num_classes: int = 2) -> nn.Module:
    """A model, which commands call ``svdpeft_example.sides:net``."""
    torch.manual_seed(0)
    return Net(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, num_classes))


class Net(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@TASKS.register("sides")
@dataclass(frozen=True)
class Sides(Task):
    """Which side of a plane a point in eight dimensions is on; accuracy in [0, 1]."""

    train_size: int = 64
    validation_size: int = 32
    test_size: int = 32

    modality: ClassVar = "vision"
    metric: ClassVar = "accuracy"
    metrics: ClassVar = ("accuracy",)
    num_classes: ClassVar = 2

    def prepare(self, loaded: Any, seed: int = 0, splits: Any = SPLITS) -> TaskData:
        def points(count: int, start: int) -> list[dict[str, Tensor]]:
            x = torch.randn(count, 8, generator=torch.Generator().manual_seed(start))
            return [{"x": row, "labels": (row.sum() > 0).long()} for row in x]

        def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {key: torch.stack([row[key] for row in rows]) for key in ("x", "labels")}

        def evaluate(model: nn.Module, examples: Any, metrics: Any = ()) -> dict[str, list[float]]:
            with evaluating(model) as device:
                batch = collate(list(examples))
                found = model(batch["x"].to(device)).argmax(-1).cpu()
            return {"accuracy": (found == batch["labels"]).float().tolist()}

        data = {split: points(getattr(self, f"{split}_size"), i) for i, split in enumerate(SPLITS)}
        return TaskData(**data, collate=collate, evaluate=evaluate)
