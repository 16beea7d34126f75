"""Writing an adapter file: what an adapter holds, as tensors and a header, into a folder that is there whole or not."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor, nn

from svdpeft.adapter.file import FORMAT, HEADER, TENSORS, held
from svdpeft.decomposition import digest
from svdpeft.methods.base import Method
from svdpeft.sites.site import Site


class Contents(NamedTuple):
    """What is written of an adapter.

    Args:
        name: of the adapter.
        model: that it is attached to.
        rules: the patterns that it was attached by, each with its method.
        sites: by name.
        whole: names of the base's parameters that are trained whole.
        values: what the base holds of these, and of the running statistics that have changed.
        skipped: weight -> why it was left.
        batch_norm: ``"train"`` or ``"frozen"``.
    """

    name: str
    model: nn.Module
    rules: Sequence[tuple[str, Method]]
    sites: Mapping[str, Site]
    whole: Sequence[str]
    values: Mapping[str, Tensor]
    skipped: Mapping[str, str]
    batch_norm: str


def save(contents: Contents, path: str | os.PathLike[str]) -> None:
    """Write an adapter into the folder ``path``, replacing an adapter that is there.

    Written under a temporary name beside it and renamed, so that a crash leaves the old folder or the new one.

    Args:
        contents: of the adapter.
        path: of the folder.

    Raises:
        FileExistsError: ``path`` exists and is not an adapter folder.
    """
    path = Path(path)
    if path.exists() and not (path / HEADER).exists() and (path.is_file() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an adapter folder: it is not overwritten")
    tensors, header = to_file(contents)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new = temporary / "new"  # a folder of its own: mkdtemp's is readable by its owner alone
        new.mkdir()
        save_file(tensors, new / TENSORS)
        (new / HEADER).write_text(json.dumps(header, indent=1) + "\n")
        _replace(new, path, temporary / "old")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def to_file(contents: Contents) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what is written: tensors by name, and the header."""
    names = {id(module): name for name, module in contents.model.named_modules()}
    weights = {id(site.weight): site.weight for site in contents.sites.values()}
    hashes = {key: digest(weight.original) for key, weight in weights.items()}
    tensors: dict[str, Tensor] = {}
    sites: dict[str, Any] = {}
    for (name, site), (factors, tied) in zip(contents.sites.items(), held(contents.sites).values(), strict=True):
        tensors |= {f"{name}/{role}": t.contiguous().clone() for role, t in factors.items()}
        sites[name] = {
            **_describe(site, names),
            "method": site.method.to_json(),
            "shape": list(site.weight.original.shape),
            "dtype": str(site.weight.original.dtype),
            "hash": hashes[id(site.weight)],
            "tensors": {role: list(t.shape) for role, t in factors.items()},
            "tied": tied,  # role -> the site, this one or an earlier one, that holds the tensor
        }
    tensors |= {n: t.contiguous().clone() for n, t in contents.values.items()}
    header = {
        "format": FORMAT,
        "name": contents.name,
        "methods": [method.to_json() for _, method in contents.rules],
        "patterns": [pattern for pattern, _ in contents.rules],
        "sites": sites,
        "whole": list(contents.whole),
        "skipped": dict(contents.skipped),
        "batch_norm": contents.batch_norm,
    }
    return tensors, header


def _describe(site: Site, names: Mapping[int, str]) -> dict[str, Any]:
    """The site's places, and which part of their weight it is."""
    places = [
        {"layer": names[id(place.module)], "parameter": place.parameter, **place.kind.to_json()}
        for place in site.places
    ]
    parts = [place.pop("part", None) for place in places]  # the same of every place
    return {"places": places, "part": None if parts[0] is None else {"name": site.part, **parts[0]}}


def _replace(new: Path, path: Path, aside: Path) -> None:
    """Move a finished folder to its place; a folder cannot be renamed over a full one, so that one steps aside."""
    if not path.exists():
        os.replace(new, path)
        return
    os.rename(path, aside)
    try:
        os.replace(new, path)
    except BaseException:
        os.rename(aside, path)
        raise
