"""What the image tasks share: the choice of examples, pictures as a model wants them, and the metrics.

Source: the few-shot protocol is that of SVFT (Lingam et al., NeurIPS 2024, arXiv:2405.19597) and of its code: 10
training pictures per class, 2 for validation, all test pictures, no augmentation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from svdpeft.models import Loaded
from svdpeft.registry import near_miss
from svdpeft.tasks.base import SPLITS, SplitName, Task, TaskData, Unread, evaluating, whole
from svdpeft.tasks.sources import Source, Split, read

EVAL_BATCH = 64
HELD_OUT = 5  # where no test split was published, one picture of so many is for the test
THREADS = 8  # that decode the pictures of a batch; decoding and resizing run outside Python's lock


def turns(labels: Tensor, seed: int = 0) -> Tensor:
    """Each example's place, 0, 1, …, in a random queue of its class.

    Args:
        labels: class of each example, (N,).
        seed: chooses the queues.

    Returns:
        Places, (N,); always the same ones for the same labels and seed.
    """
    generator = torch.Generator().manual_seed(seed)
    turn = torch.empty_like(labels)
    for label in labels.unique():
        mine = labels == label
        turn[mine] = torch.randperm(int(mine.sum()), generator=generator)
    return turn


def stratified_order(labels: Tensor, seed: int = 0) -> Tensor:
    """One fixed order of which every prefix holds the classes in equal shares, within one example.

    Args:
        labels: class of each example, (N,).
        seed: chooses the order.

    Returns:
        A permutation of 0..N-1, (N,); always the same one for the same labels and seed.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 1, 1, 1])
        >>> labels[stratified_order(labels)]
        tensor([0, 1, 0, 1, 0, 1])
    """
    return torch.argsort(turns(labels, seed) * (int(labels.max()) + 1) + labels)


def choose(
    source: Source, shots: int | None, validation_shots: int, seed: int, splits: Collection[SplitName] = SPLITS
) -> dict[str, tuple[Split, Tensor]]:
    """Choose the examples of each split: disjoint, the same number of every class.

    Test: the published test split; without one, every fifth picture of each class, in a random but fixed order.
    Validation: ``validation_shots`` of each class, of the published validation split or of what is left of the
    training split; always the same ones. Training: ``shots`` of each class, of what is left of the training split.

    Args:
        source: the published data.
        shots: training examples per class; None takes all.
        validation_shots: validation examples per class.
        seed: chooses the training examples, and nothing else.
        splits: which to choose; the classes need not be rich enough for the others.

    Returns:
        For each of ``splits`` the published split and indices into it, every prefix of which
        holds the classes in equal shares.

    Raises:
        ValueError: a class has too few pictures.
    """
    train, test = source.train, source.test
    left = torch.arange(len(train.labels))
    if test is None:
        held = turns(train.labels) % HELD_OUT == 0
        test, tested, left = train, left[held], left[~held]
    else:
        tested = torch.arange(len(test.labels))

    def front(split: Split, among: Tensor, seed: int, shots: int | None, purpose: str) -> tuple[Tensor, Tensor]:
        counts = split.labels[among].bincount(minlength=len(source.classes))
        poorest = int(counts.argmin())
        if counts[poorest] < (shots or 1):
            raise ValueError(
                f"class {source.classes[poorest]!r} has {counts[poorest]} pictures left for {purpose}, "
                f"which needs {shots or 1} of each class"
            )
        order = among[stratified_order(split.labels[among], seed)]
        return order.tensor_split([len(order) if shots is None else shots * len(source.classes)])  # type: ignore

    found: dict[str, tuple[Split, Tensor]] = {}
    if "validation" in splits or ("train" in splits and source.validation is None):
        validation = source.validation or train
        among = left if source.validation is None else torch.arange(len(validation.labels))
        validated, rest = front(validation, among, 0, validation_shots, "validation")
        left = rest if source.validation is None else left
        found["validation"] = validation, validated
    if "train" in splits:
        found["train"] = train, front(train, left, seed, shots, "training")[0]
    if "test" in splits:
        found["test"] = test, tested[stratified_order(test.labels[tested])]
    return {split: found[split] for split in splits}


class Pictures(Dataset[dict[str, Tensor]]):
    """Pictures as one model wants to see them: ``{"x": (3, H, W), "labels": ()}``, read when they are asked for.

    Args:
        split: published pictures.
        indices: which of them, (N,).
        transform: picture -> (3, H, W).
        dtype: of ``x``: the model's own.
    """

    def __init__(
        self, split: Split, indices: Tensor, transform: Callable[[Image.Image], Tensor], dtype: torch.dtype
    ) -> None:
        self.split, self.indices, self.transform, self.dtype = split, indices, transform, dtype
        self.labels = split.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        picture = self.split.picture(int(self.indices[index]))
        return {"x": self.transform(picture).to(self.dtype), "labels": self.labels[index]}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """A batch, as a DataLoader asks for it: decoded side by side."""
        # Threads of its own for each batch: those of a pool that lives longer would be dead in a forked worker.
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
            return list(pool.map(self.__getitem__, indices))


def view(config: Mapping[str, Any], crop: str = "center") -> Callable[[Image.Image], Tensor]:
    """timm's transform for evaluation: resize, crop, normalise; nothing random.

    Args:
        config: timm's data config: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``.
        crop: ``"center"`` resizes the shorter side to size / ``crop_pct`` and takes the centre; ``"squash"`` resizes
            the whole picture to the input size, as SVFT's code does.

    Returns:
        Picture -> (3, H, W) float32.
    """
    from timm.data import create_transform

    options = dict(config) | ({"crop_pct": 1.0, "crop_mode": "squash"} if crop == "squash" else {})
    return create_transform(**options, is_training=False)  # type: ignore[return-value]


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that the model wants its pictures in: that of its first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack examples: ``{"x": (B, C, H, W), "labels": (B,)}``."""
    return {key: torch.stack([example[key] for example in examples]) for key in ("x", "labels")}


def evaluate(model: nn.Module, examples: Dataset[Any], metrics: Collection[str] = ()) -> dict[str, list[float]]:
    """Accuracy (1 or 0) and cross-entropy of each picture, in nats.

    Raises:
        ValueError: ``metrics`` names another one.
    """
    found: dict[str, list[float]] = {"accuracy": [], "loss": []}
    for name in metrics:
        if name not in found:
            raise ValueError(f"image tasks have no metric {name!r}: {near_miss(name, found)}")
    # A generator of its own: else the loader draws a seed from the global one and so changes what follows.
    batches = DataLoader(examples, EVAL_BATCH, collate_fn=collate, generator=torch.Generator())
    with evaluating(model) as device:
        for batch in batches:
            logits, labels = model(batch["x"].to(device)).float(), batch["labels"].to(device)
            found["accuracy"] += (logits.argmax(-1) == labels).float().tolist()
            found["loss"] += F.cross_entropy(logits, labels, reduction="none").tolist()
    return {name: values for name, values in found.items() if not metrics or name in metrics}


@dataclass(frozen=True)
class ImageTask(Task):
    """Classification of pictures, with few examples of each class; accuracy in [0, 1].

    Args:
        train_size: number of training pictures, the front of those that ``shots`` allows; None takes all of them.
        validation_size: the same of the validation pictures.
        test_size: the same of the test pictures, all of which are the protocol's.
        data: ``"torchvision:NAME"``, ``"hf:NAME"`` (hub or folder), or a folder with one folder per class.
        root: folder in which the data lie; see ``sources.read``.
        download: whether torchvision may download.
        label: ``hf:`` the column of the class, where it is not clear.
        shots: training pictures per class; ``"all"`` takes the whole training split.
        validation_shots: validation pictures per class.
        data_seed: chooses the training pictures; ``"run"`` lets the seed of the run choose. Validation and test
            pictures are the same at every seed.
        crop: ``"center"``, as timm evaluates the model, or ``"squash"``, the whole picture, as in SVFT's code.
    """

    train_size: int | None = None  # type: ignore[assignment]
    validation_size: int | None = None  # type: ignore[assignment]
    test_size: int | None = None  # type: ignore[assignment]
    data: str = field(kw_only=True)
    root: str | None = None
    download: bool = False
    label: str | None = None
    shots: int | Literal["all"] = 10  # no None: a TOML file cannot say it
    validation_shots: int = 2
    data_seed: int | Literal["run"] = 0
    crop: Literal["center", "squash"] = "center"

    modality = "vision"
    metric = "accuracy"
    metrics = ("accuracy", "loss")

    def __post_init__(self) -> None:
        for name, low, words in (("shots", 1, ["all"]), ("validation_shots", 1, []), ("data_seed", 0, ["run"])):
            value = getattr(self, name)
            if value not in words and not (whole(value) and value >= low):
                other = "".join(f" nor {word!r}" for word in words)
                raise ValueError(f"{name} {value!r} of task {self.name!r} is no whole number from {low}{other}")
        if self.crop not in ("center", "squash"):
            raise ValueError(f"crop {self.crop!r} of task {self.name!r} is neither 'center' nor 'squash'")

    @property
    def source(self) -> Source:
        """The published data."""
        return read(self.data, self.root, self.download, self.label)

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of classes; reads the data's list of them."""
        return len(self.source.classes)

    def prepare(self, loaded: Loaded, seed: int = 0, splits: Collection[SplitName] = SPLITS) -> TaskData:
        """Pictures in the input size, normalisation and dtype of this model.

        Args:
            loaded: the model.
            seed: of the run; used where ``data_seed`` is ``"run"``.
            splits: which to prepare. The labels of all are read: the classes are those of the training split.

        Raises:
            ValueError: the data are not there, a class has too few pictures, ``loaded`` is no vision model, or a size
                is outside what the data give.
        """
        shots = None if self.shots == "all" else self.shots
        drawn = seed if self.data_seed == "run" else self.data_seed
        chosen = choose(self.source, shots, self.validation_shots, drawn, splits)
        limits = {name: len(indices) for name, (_, indices) in chosen.items()}
        sizes = {name: getattr(self, f"{name}_size") for name in chosen}
        sizes = {name: limits[name] if size is None else size for name, size in sizes.items()}
        replace(self, **{f"{name}_size": size for name, size in sizes.items()}).check(loaded, **limits)
        transform, dtype = view(loaded.processor, self.crop), dtype_of(loaded.model)
        data: dict[str, Dataset[Any]] = dict.fromkeys(SPLITS, Unread())
        for name, (split, order) in chosen.items():
            data[name] = Pictures(split, order[: sizes[name]], transform, dtype)
        return TaskData(**data, collate=collate, evaluate=evaluate)
