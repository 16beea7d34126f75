"""A folder with a model: its configuration, and its tensors, which are read one at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG, SINGLE = "config.json", "model.safetensors"
INDEX = f"{SINGLE}.index.json"
WORDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # safetensors' own


class Entry(NamedTuple):
    """What a file says of a tensor.

    Args:
        file: that it is in.
        dtype: in safetensors' words, such as ``"BF16"``.
        shape: of it.
        size: bytes.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    size: int


class Folder:
    """A model on the disk, in transformers' layout or in timm's.

    Args:
        path: of the folder: ``config.json`` and ``model.safetensors``, or shards and their index.

    Raises:
        ValueError: it is none, or a file of it is missing or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not (self.path / CONFIG).is_file():
            what = "has no config.json: it is not a model in transformers' or timm's layout"
            raise ValueError(f"the folder {self.path} {what if self.path.is_dir() else 'does not exist'}")
        self.config: dict[str, Any] = self._json(CONFIG)
        self.index: dict[str, Any] = self._json(INDEX) if (self.path / INDEX).is_file() else {}
        if not self.index and not (self.path / SINGLE).is_file():
            raise ValueError(
                f"{self.path} has neither {SINGLE} nor {INDEX}: load the model and save it again, by "
                "model.save_pretrained(folder), or timm's save_for_hf(model, folder, safe_serialization=True)"
            )
        self.files = list(dict.fromkeys(self._weight_map().values())) if self.index else [SINGLE]
        self.metadata: dict[str, dict[str, str]] = {}  # of each file
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            self._look(file)
        if lost := [name for name in self.index.get("weight_map", {}) if name not in self.entries]:
            raise ValueError(f"{self.path}: no file has {lost[0]}, which {INDEX} names")

    @property
    def of_timm(self) -> bool:
        """Whether timm has written it."""
        return isinstance(self.config.get("architecture"), str)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor. Its file is mapped into memory, and no more of it is read than is looked at."""
        with safe_open(self.path / self.entries[name].file, "pt") as opened:
            return opened.get_tensor(name)

    def _look(self, file: str) -> None:
        try:
            with safe_open(self.path / file, "pt") as opened:
                self.metadata[file] = opened.metadata() or {}
                for name in opened.keys():  # noqa: SIM118, it is no mapping
                    tensor = opened.get_tensor(name)
                    dtype = opened.get_slice(name).get_dtype()
                    self.entries[name] = Entry(file, dtype, tuple(tensor.shape), tensor.nbytes)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path / file} is missing, damaged or cut off: {error}") from error

    def _weight_map(self) -> dict[str, str]:
        """Name of a tensor -> the file that it is in, which lies in the folder: one of that name is written, too."""
        found = self.index.get("weight_map")
        if not isinstance(found, dict):
            raise ValueError(f"{self.path / INDEX} is damaged: its weight_map is {found!r:.80}")
        for name, file in found.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{self.path / INDEX} is damaged: {name} is in {file!r:.80}, no file beside it")
        return found

    def _json(self, file: str) -> dict[str, Any]:
        try:
            found = json.loads((self.path / file).read_text())
        except (ValueError, RecursionError) as error:  # no JSON, no text, or more levels than Python calls itself for
            raise ValueError(f"{self.path / file} is damaged: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{self.path / file} is damaged: it holds a {type(found).__name__}, not an object")
        return found
