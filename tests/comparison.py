"""A model and a task that are small enough to compare methods in a second."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from svdpeft.models import Loaded
from svdpeft.tasks.base import Task, TaskData

# a comparison on a real model, as short as it can be
REAL = {
    "model": "efficientnet-lite0",
    "seeds": [0],
    "epochs": 1,
    "batch_size": 8,
    "search": False,
    "task_options": {"train_size": 32, "test_size": 32},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(12, 20)
        self.wide = nn.Linear(20, 14)
        self.head = nn.Linear(14, 2)

    def forward(self, x):
        return self.head(torch.relu(self.wide(torch.relu(self.body(x)))))


def load(name: str, *, num_classes: int, image_size: None, dtype: torch.dtype = torch.float32, seed: int = 0) -> Loaded:
    """In the place of ``svdpeft.models.load``: the model is called ``tiny``."""
    assert name == "tiny"
    torch.manual_seed(7)
    return Loaded(Net().to(dtype), name, {}, "vision", "head")


@dataclass(frozen=True)
class Signs(Task):
    """Is the sum of the inputs positive?"""

    train_size: int = 64
    validation_size: int = 30
    test_size: int = 40

    modality: ClassVar = "vision"
    metric: ClassVar = "accuracy"
    metrics: ClassVar = ("accuracy", "loss")
    num_classes: ClassVar = 2

    looked_at: ClassVar[list] = []  # the size of every split that a model was judged on

    def prepare(self, loaded, seed=0):
        def draw(count, seed):
            x = torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))
            return [{"x": row, "labels": (row.sum() > 0).long()} for row in x]

        def collate(examples):
            return {key: torch.stack([e[key] for e in examples]) for key in examples[0]}

        @torch.no_grad()
        def evaluate(model, examples, metrics=()):
            self.looked_at.append(len(examples))
            batch = collate(examples)
            y = model(batch["x"])
            found = {
                "accuracy": (y.argmax(-1) == batch["labels"]).float().tolist(),
                "loss": nn.functional.cross_entropy(y, batch["labels"], reduction="none").tolist(),
            }
            return {name: values for name, values in found.items() if not metrics or name in metrics}

        splits = draw(self.train_size, 0), draw(self.validation_size, 1), draw(self.test_size, 2)
        return TaskData(*splits, collate, evaluate)
