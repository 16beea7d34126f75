"""What a calibration saw, and its file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from svdpeft.atomic import replacing
from svdpeft.methods.base import Statistics

FORMAT = "svdpeft calibration 1"
FIELDS = ("second", "total", "gradient")


class Calibration(Mapping[str, Statistics]):
    """What ``calibrate`` saw: site name -> ``Statistics``. ``attach(..., calibration=…)`` takes it."""

    def __init__(self, sites: Mapping[str, Statistics]) -> None:
        self._sites = dict(sites)

    def __getitem__(self, name: str) -> Statistics:
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __repr__(self) -> str:
        what = [
            f"{field} of {count} sites"
            for field, key in (("inputs", "second"), ("gradients", "gradient"))
            if (count := sum(getattr(s, key) is not None for s in self._sites.values()))
        ]
        return f"Calibration({', '.join(what)})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it into one file, which is there whole or not at all.

        Raises:
            FileExistsError: ``path`` exists and is not a calibration file.
        """
        path = Path(path)
        if path.exists():
            try:
                _header(path)
            except ValueError as error:
                raise FileExistsError(f"{path} exists and is not a calibration file: it is not overwritten") from error
        tensors: dict[str, Tensor] = {}
        keys: dict[int, str] = {}  # the parts of a fused weight share their inputs
        sites = {}
        for name, seen in self._sites.items():
            sites[name] = {"count": seen.count}
            for field in FIELDS:
                if (tensor := getattr(seen, field)) is not None:
                    key = sites[name][field] = keys.setdefault(id(tensor), f"{name}/{field}")
                    if key not in tensors:
                        tensors[key] = tensor.detach().cpu().contiguous()
        with replacing(path) as new:
            save_file(tensors, new, metadata={"format": FORMAT, "sites": json.dumps(sites)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a file that ``save`` wrote; its tensors are on the CPU.

        Raises:
            ValueError: no calibration file, another format, or tensors that do not fit together.
        """
        path = Path(path)
        listed = _header(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        sites = {}
        for name, entry in listed.items():
            try:
                count, found = int(entry["count"]), {field: tensors[entry[field]] for field in FIELDS if field in entry}
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path} is damaged: {name} lacks {error}") from error
            second, summed = found.get("second"), found.get("total")
            if second is not None and (summed is None or second.shape != (*summed.shape, summed.shape[-1])):
                raise ValueError(f"{path} is damaged: at {name} Σxxᵀ has shape {list(second.shape)}")
            sites[name] = Statistics(count, **found)
        return cls(sites)


def _header(path: Path) -> dict[str, Any]:
    """Return what a calibration file says of its sites."""
    if not path.is_file():
        raise ValueError(f"{path} is not a calibration file: there is no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a calibration file, or is damaged or cut off: {error}") from error
    if metadata.get("format") != FORMAT:
        found = metadata.get("format")
        raise ValueError(f"{path} has format {found!r}; this version of svdpeft reads {FORMAT!r}")
    return json.loads(metadata["sites"])
