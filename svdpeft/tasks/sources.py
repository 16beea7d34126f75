"""Where labelled pictures come from: torchvision's data sets, those of ``datasets``, and folders."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from svdpeft.models import cache
from svdpeft.registry import near_miss

VALIDATION = ("validation", "val", "valid")  # what a validation split may be called
# What torchvision calls training, validation and test split, where it is not just "train" and "test".
SPLITS: dict[str, tuple[str, str | None, str]] = {
    **dict.fromkeys(("Flowers102", "DTD", "FGVCAircraft", "PCAM", "RenderedSST2"), ("train", "val", "test")),
    **dict.fromkeys(("ImageNet", "Imagenette"), ("train", None, "val")),
    "Country211": ("train", "valid", "test"),
    "OxfordIIITPet": ("trainval", None, "test"),
    "Places365": ("train-standard", None, "val"),
}
VARIANTS = {"EMNIST": {"split": "balanced"}}  # what it calls a split is one of six data sets
LAYOUTS = {
    "CIFAR100": "cifar-100-python/train, test and meta (pickles)",
    "Flowers102": "flowers-102/imagelabels.mat, setid.mat and jpg/image_00001.jpg …",
    "Food101": "food-101/meta/train.json and test.json, and images/<class>/*.jpg",
}
FOLDERS = "<class>/*.jpg, or train/ with such folders in it, and val/ and test/ if there are any"


@dataclass(frozen=True)
class Split:
    """Labelled pictures; a picture is read when it is asked for.

    Args:
        items: ``items[i][key]`` is a picture, or the path of one.
        key: see ``items``.
        labels: class of each, (N,) int64.
    """

    items: Any
    key: int | str
    labels: Tensor

    def picture(self, index: int) -> Image.Image:
        """The picture with this index, in colour."""
        found = self.items[index][self.key]
        if isinstance(found, Image.Image):
            return found.convert("RGB")
        with Image.open(found) as file:
            return file.convert("RGB")


@dataclass(frozen=True)
class Source:
    """A data set as it was published; what was not published is None.

    Args:
        classes: names, in the order of the labels.
        train: training split.
        validation: validation split.
        test: test split.
    """

    classes: tuple[str, ...]
    train: Split
    validation: Split | None = None
    test: Split | None = None

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test"):
            split: Split | None = getattr(self, name)
            outside = [] if split is None else split.labels[(split.labels < 0) | (split.labels >= len(self.classes))]
            if len(outside):
                raise ValueError(f"label {int(outside[0])} of the {name} split is outside [0, {len(self.classes) - 1}]")


def read(data: str, root: str | None = None, download: bool = False, label: str | None = None) -> Source:
    """Read a data set by name or path.

    Args:
        data: ``"torchvision:NAME"``, a class of ``torchvision.datasets`` with one label per picture; ``"hf:NAME"``, a
            data set of the hub, or a folder that ``datasets`` wrote or can load; else the path of a folder with one
            folder per class.
        root: torchvision: the folder that its ``root`` argument means, ``data`` in the cache where it is None.
            ``hf:`` the cache of ``datasets``, its own where it is None. A folder: what a relative path starts from.
        download: whether torchvision may download.
        label: ``hf:`` the column of the class; None takes the only column of classes, or ``"label"``.

    Returns:
        The splits as published. Where there is a validation but no test split, the validation split is the test.

    Raises:
        ValueError: no such data set, or something else is at its place.
        ImportError: ``datasets`` is not installed.
    """
    return _read(data, root, download, label, Path.cwd())


@lru_cache(maxsize=1)  # the runs of a comparison use one after the other what was read once
def _read(data: str, root: str | None, download: bool, label: str | None, where: Path) -> Source:
    """``where`` is where a relative path begins."""
    origin, mark, name = data.partition(":")
    if download and origin != "torchvision":
        raise ValueError(f"download=True is for torchvision's data sets, not for {data!r}")
    if label is not None and origin != "hf":
        raise ValueError(f"label={label!r} names a column of 'hf:' data; {data!r} has none")
    if origin == "torchvision":
        return _torchvision(name, Path(root).expanduser() if root else cache.root() / "data", download)
    if origin == "hf":
        return _datasets(name, root, label)
    folder = Path(root or "", data).expanduser()
    if not folder.is_dir():
        known = ("torchvision:NAME", "hf:NAME", "a folder")
        hint = f": {near_miss(origin + ':NAME', known)}" if mark else f"; expected in it: {FOLDERS}"
        raise ValueError(f"there is no folder {str(folder)!r}{hint}")
    return _folder(folder)


def _unread(path: Any) -> Any:
    """Stands in for torchvision's loader, so that reading the labels does not decode the pictures."""
    return path


def _torchvision(name: str, root: Path, download: bool) -> Source:
    from torchvision import datasets

    if name not in datasets.__all__:
        raise ValueError(f"torchvision has no data set {name!r}: {near_miss(name, datasets.__all__)}")
    cls = getattr(datasets, name)
    of = datasets.MNIST if name in ("EMNIST", "QMNIST") else cls  # which pass on what they do not name
    known = inspect.signature(of).parameters
    options: dict[str, Any] = {"root": root, **VARIANTS.get(name, {})}
    if "loader" in known or name == "ImageNet":
        options["loader"] = _unread
    if download:
        if "download" not in known:
            raise ValueError(f"torchvision cannot download {name}; put it into {root}")
        options["download"] = True

    def split(**which: Any) -> tuple[Split, Any]:
        try:
            found = cls(**options, **which)
        except (OSError, RuntimeError) as error:
            layout = f", expected {LAYOUTS[name]}" if name in LAYOUTS else ""
            raise ValueError(f"{root} does not hold torchvision's {name}{layout}: {error}") from error
        except (TypeError, ValueError, ImportError) as error:
            raise ValueError(f"torchvision's {name} cannot be read as one class per picture: {error}") from error
        try:
            labels = torch.tensor([int(found[i][1]) for i in range(len(found))])
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(f"torchvision's {name} has not one class per picture: {error}") from error
        return Split(found, 0, labels), getattr(found, "classes", range(int(labels.max()) + 1))

    if "train" in known:
        (train, classes), validation, test = split(train=True), None, split(train=False)[0]
    elif "split" in known:
        names = SPLITS.get(name, ("train", None, "test"))
        train, classes = split(split=names[0])
        validation = None if names[1] is None else split(split=names[1])[0]
        test = split(split=names[2])[0]
    else:
        (train, classes), validation, test = split(), None, None
    return Source(tuple(map(str, classes)), train, validation, test)


def _folder(folder: Path) -> Source:
    from torchvision.datasets import ImageFolder

    classes: list[str] = []

    def split(place: Path) -> Split:
        try:
            found = ImageFolder(str(place), loader=_unread)
        except OSError as error:
            raise ValueError(f"{place} is no folder of pictures, expected {FOLDERS}: {error}") from error
        classes.extend(found.classes if not classes else ())
        labels = _encode([found.classes[label] for _, label in found.samples], classes, str(place))
        return Split(found.samples, 0, labels)

    if not (folder / "train").is_dir():
        train = split(folder)
        return Source(tuple(classes), train)
    train = split(folder / "train")
    held = {name: split(folder / name) for name in (*VALIDATION, "test") if (folder / name).is_dir()}
    return Source(tuple(classes), train, *_held_out(held))


def _datasets(name: str, cache_dir: str | None, label: str | None) -> Source:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ImportError(f'the data "hf:{name}" needs datasets: pip install "svdpeft[data]"') from error
    local = Path(name).expanduser()
    try:
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            found: Any = datasets.load_from_disk(str(local))
        else:
            found = datasets.load_dataset(str(local) if local.is_dir() else name, cache_dir=cache_dir)
    except (OSError, ValueError, DatasetsError) as error:
        expected = "the name of a data set on the hub, or a folder that datasets wrote or can load"
        raise ValueError(f"'hf:{name}' cannot be read, expected {expected}: {error}") from error
    whole = not isinstance(found, datasets.DatasetDict)
    splits = {"train": found} if whole else {str(part): each for part, each in found.items()}
    if "train" not in splits:
        raise ValueError(f"'hf:{name}' has no training split: {near_miss('train', splits)}")
    features = splits["train"].features
    pictures = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if not pictures:
        raise ValueError(f"'hf:{name}' has no column of pictures; its columns: {', '.join(features)}")
    column = label or _label_column(name, features, datasets.ClassLabel)
    if column not in features:
        raise ValueError(f"'hf:{name}' has no column {column!r}: {near_miss(column, features)}")
    named = isinstance(features[column], datasets.ClassLabel)
    classes = features[column].names if named else sorted(set(splits["train"][column][:]))

    def split(part: str) -> Split:
        values = splits[part][column][:]
        labels = torch.tensor(values) if named else _encode(values, classes, f"the {part} split of 'hf:{name}'")
        return Split(splits[part].select_columns([pictures[0]]), pictures[0], labels)

    held = {part: split(part) for part in splits if part in (*VALIDATION, "test")}
    return Source(tuple(map(str, classes)), split("train"), *_held_out(held))


def _label_column(name: str, features: Any, kind: type) -> str:
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) != 1 and "label" not in features:
        raise ValueError(f"'hf:{name}' has {len(found)} columns of classes: choose label= from {', '.join(features)}")
    return found[0] if len(found) == 1 else "label"


def _encode(values: Sequence[Any], classes: Sequence[Any], place: str) -> Tensor:
    numbers = {name: i for i, name in enumerate(classes)}
    unknown = sorted({str(value) for value in values if value not in numbers})
    if unknown:
        raise ValueError(f"{place} has the class {unknown[0]!r}, which the training split has not")
    return torch.tensor([numbers[value] for value in values])


def _held_out(splits: dict[str, Split]) -> tuple[Split | None, Split | None]:
    """Validation and test; with one of the two alone, it is the test."""
    validation = next((splits[name] for name in VALIDATION if name in splits), None)
    return (validation, splits["test"]) if "test" in splits else (None, validation)
