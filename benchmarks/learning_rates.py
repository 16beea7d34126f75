"""Where the default learning rates of `svdpeft compare` come from: a grid on validation digits outside the test split.

    python benchmarks/learning_rates.py [MODEL] > benchmarks/results/learning-rates-MODEL.md

Trains on 1,000 digits of mnist5k's training pool and validates on 1,000 others of it; one seed, the budget, targets and
epochs of the default comparison. The test digits are never seen.
"""

from __future__ import annotations

import sys

import transformers
from torch.utils.data import Subset
from tqdm import tqdm

from svdpeft.compare import runner
from svdpeft.compare.spec import Entry, read_spec
from svdpeft.tasks import mnist5k
from svdpeft.tasks.base import TaskData

HEAD = {"head-only": (1e-2,)}  # the head's own rate is fixed, head_lr
GRIDS = {
    "efficientnet-lite0": {
        "full": (3e-4, 1e-3, 3e-3),
        "lora": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        "pissa": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        "sorsa": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        "svft": (1e-2, 3e-2, 1e-1, 3e-1),
    },
    "dinov2-vits14": {
        "full": (1e-4, 3e-4),
        "lora": (3e-3, 1e-2),
        "pissa": (3e-4, 1e-3, 3e-3),
        "sorsa": (3e-4, 1e-3, 3e-3),
        "svft": (1e-2, 3e-2, 1e-1),
    },
}


class Validation(mnist5k.Mnist5k):
    """mnist5k with its second thousand training digits in place of the test split."""

    def prepare(self, loaded, seed=0):
        whole = super().prepare(loaded, seed)
        held_out = Subset(whole.train, range(1000, 2000))
        data = TaskData(Subset(whole.train, range(1000)), held_out, whole.collate, whole.evaluate)
        object.__setattr__(data, "evaluate", lambda model: {"accuracy": accuracy(model, held_out, whole.collate)})
        return data


def accuracy(model, data, collate) -> float:
    """Share of right answers."""
    import torch

    model.eval()
    right = 0
    with torch.no_grad():
        for i in range(0, len(data), 100):
            batch = collate([data[j] for j in range(i, i + 100)])
            right += int((model(batch["x"]).argmax(-1) == batch["labels"]).sum())
    return right / len(data)


def main() -> None:
    transformers.logging.set_verbosity_error()
    model = sys.argv[1] if len(sys.argv) > 1 else "efficientnet-lite0"
    spec = read_spec(model=model, seeds=[100], sizes={"train_size": 2000})
    rows = [(entry, lr) for entry in spec.methods for lr in (GRIDS[model] | HEAD)[entry.method.name]]
    Validation.name = "mnist5k"
    object.__setattr__(spec, "make_task", lambda: Validation(train_size=2000, test_size=10))
    print(f"| method | {model}: learning rate | validation accuracy % |\n| --- | ---: | ---: |")
    for entry, lr in tqdm(rows, file=sys.stderr):
        record = runner.run(spec, Entry(entry.label, entry.method, lr), 100)
        print(f"| {entry.label} | {lr:g} | {100 * record['metric']['value']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
