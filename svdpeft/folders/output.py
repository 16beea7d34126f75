"""A new folder beside that of a model: its tensors, their index, the configuration, and copies of all else."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from svdpeft.folders import shards
from svdpeft.folders.folder import CONFIG, INDEX, WORDS, Entry
from svdpeft.folders.skeleton import Skeleton

# Files of weights, of the base: beside the new ones they would be the old model.
FORMATS = "safetensors bin pt pth ckpt h5 msgpack onnx onnx_data gguf index.json"
WEIGHTS = tuple(f".{end}" for end in FORMATS.split())
DTYPES = {"dtype", "torch_dtype"}  # what transformers calls it, and has called it


def check_new(path: Path) -> None:
    """Refuse to write where something is.

    Raises:
        FileExistsError: something is.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists: a folder is written anew, and none is overwritten")


def entries(skeleton: Skeleton, dtype: torch.dtype | None, shard_size: int | str | None) -> dict[str, Entry]:
    """What the new folder will have of every tensor.

    Args:
        skeleton: of the model, as it will be.
        dtype: of floating-point tensors; ``None``: their own.
        shard_size: of a file; ``None``: the files of the base.

    Raises:
        ValueError: sizes for timm, which reads one file, or something that is no size.
    """
    made = {name: _cast(skeleton, name, entry, dtype) for name, entry in skeleton.folder.entries.items()}
    if shard_size is None:
        return made
    if skeleton.folder.of_timm:
        raise ValueError(f"shard_size={shard_size!r}: {skeleton.folder.path} is of timm, which reads one file")
    return shards.partition(made, shard_size)


def _cast(skeleton: Skeleton, name: str, entry: Entry, dtype: torch.dtype | None) -> Entry:
    shape, count = skeleton.shape(name), math.prod(entry.shape)
    width = entry.size // max(count, 1)
    if dtype is not None and entry.dtype in WORDS.values():
        entry, width = entry._replace(dtype=WORDS[dtype]), dtype.itemsize
    return entry._replace(shape=shape, size=math.prod(shape) * width)


def write(
    skeleton: Skeleton,
    path: Path,
    entries: Mapping[str, Entry],
    value: Callable[[str], Iterable[Tensor]],
    dtype: torch.dtype | None,
) -> None:
    """Write the folder.

    Args:
        skeleton: of the model.
        path: of the new folder.
        entries: what it will have.
        value: gives the tensor of a name, in parts of consecutive rows.
        dtype: that its configuration will name; ``None``: the base's.
    """
    folder = skeleton.folder
    shutil.copytree(folder.path, path, ignore=_weights)
    files: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        files.setdefault(entry.file, {})[name] = entry
    for file, its in files.items():
        shards.write(path / file, its, value, next(iter(folder.metadata.values())))
    write_index(path, entries, folder.index.get("metadata", {}))
    if skeleton.grown:
        skeleton.model.config.save_pretrained(path)  # pyright: ignore
    if dtype is not None or skeleton.grown:
        _dump(_with_dtype(json.loads((path / CONFIG).read_text()), dtype), path / CONFIG)


def write_index(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Write which file has which tensor, where there are several files.

    Args:
        path: of the folder.
        entries: its tensors.
        metadata: of the index, beside the size of all.
    """
    if len({entry.file for entry in entries.values()}) > 1:
        size = sum(entry.size for entry in entries.values())
        files = {name: entry.file for name, entry in sorted(entries.items())}
        _dump({"metadata": {**metadata, "total_size": size}, "weight_map": files}, path / INDEX)


def _weights(folder: str, names: list[str]) -> list[str]:
    """The files that are not copied: weights, and what is hidden, such as git's."""
    return [name for name in names if name.startswith(".") or name.endswith(WEIGHTS)]


def _with_dtype(config: Any, dtype: torch.dtype | None) -> Any:
    """A configuration, and those inside it, that name another dtype."""
    if not isinstance(config, dict) or dtype is None:
        return config
    word = str(dtype).removeprefix("torch.")
    return {key: word if key in DTYPES and value else _with_dtype(value, dtype) for key, value in config.items()}


def _dump(content: Any, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
