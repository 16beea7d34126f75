"""What a calibration saw, and its file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from svdpeft.adapter.file import read_tensors, undamaged
from svdpeft.atomic import replacing
from svdpeft.methods.base import Statistics

FORMAT = "svdpeft calibration 1"
FIELDS = ("second", "total", "gradient", "kept")


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
            for field, key in (("inputs", "second"), ("gradients", "gradient"), ("inputs to preserve", "kept"))
            if (count := sum(getattr(s, key) is not None for s in self._sites.values()))
        ]
        return f"Calibration({', '.join(what)})"

    def preserving(self, kept: Mapping[str, Statistics]) -> Calibration:
        """Return the same with the inputs on data whose outputs are to stay, E[x xᵀ] (*b, n, n), for ``SCLoRA``.

        Args:
            kept: what ``calibrate`` saw of the same model on those data; sites that only it has are left out.

        Raises:
            ValueError: it has not seen the inputs of a site.

        Example:
            >>> model, task, kept = nn.Sequential(nn.Linear(6, 4)), [torch.randn(20, 6)], [torch.randn(20, 6)]
            >>> svdpeft.calibrate(model, task).preserving(svdpeft.calibrate(model, kept))
            Calibration(inputs of 1 sites, inputs to preserve of 1 sites)
        """
        found = {}
        for name, seen in self._sites.items():
            other = kept.get(name, Statistics())
            if other.second is None:
                raise ValueError(f"the calibration on what is to be kept has no inputs of {name}")
            found[name] = seen._replace(kept=other.second / other.count)
        return Calibration(found)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it into one file, which is there whole or not at all.

        Raises:
            FileExistsError: ``path`` exists and is not a calibration file.
        """
        path = Path(path)
        if path.exists():
            try:
                with undamaged(path, kind=ValueError), safe_open(path, "numpy") as file:
                    _check_format(file.metadata() or {}, path)
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
        with undamaged(path, kind=ValueError):
            metadata, tensors = read_tensors(path)
            _check_format(metadata, path)
            return cls(
                {name: _statistics(name, entry, tensors) for name, entry in json.loads(metadata["sites"]).items()}
            )


def _statistics(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Statistics:
    """What a file says of a site."""
    names = {field: entry[field] for field in FIELDS if field in entry}
    if lost := [key for key in names.values() if key not in tensors]:
        raise ValueError(f"{name} lacks {lost[0]!r}")
    found = {field: tensors[key] for field, key in names.items()}
    second, total = found.get("second"), found.get("total")
    if second is not None and (total is None or second.shape != (*total.shape, total.shape[-1])):
        raise ValueError(f"at {name} Σxxᵀ has shape {list(second.shape)}, which does not fit Σx")
    if (kept := found.get("kept")) is not None and (second is None or kept.shape != second.shape):
        raise ValueError(f"at {name} the inputs to preserve have shape {list(kept.shape)}, those of the task another")
    if type(entry["count"]) is not int or entry["count"] < 0:
        raise ValueError(f"at {name} {entry['count']!r} is no number of vectors")
    return Statistics(entry["count"], **found)


def _check_format(metadata: Mapping[str, str], path: Path) -> None:
    if metadata.get("format") != FORMAT:
        found = metadata.get("format")
        raise ValueError(f"{path} has format {found!r}; this version of svdpeft reads {FORMAT!r}")
