"""Writing an adapter file: what an adapter holds, as tensors and a header; nothing else in its folder is touched."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from svdpeft.adapter.deriving import Bases, derived
from svdpeft.adapter.file import (
    DIGESTS,
    FORMAT,
    HEADER,
    TENSORS,
    WITHOUT_BASES,
    State,
    check_ours,
    free_of,
    held,
    identified,
)
from svdpeft.adapter.packing import packed
from svdpeft.atomic import replacing
from svdpeft.decomposition import all_finite, digest
from svdpeft.methods.base import Method
from svdpeft.sites.shards import gathered, reshard, shape_of, write_once
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


def save(contents: Contents, path: str | os.PathLike[str], bases: Bases) -> None:
    """Write an adapter into the folder ``path``: two files, beside whatever else is in it.

    Each is written under a temporary name and moved. The tensors carry the header, and that is what is read: a crash in
    between leaves an adapter that is whole, the old one or the new one, and so do two processes that save at once.

    Of a model that is sharded over processes all of them must call this: what is sharded of the adapter is gathered,
    one of them writes, and the others wait for it.

    Args:
        contents: of the adapter.
        path: of the folder; it is made where it is missing.
        bases: as for ``Adapter.save``.

    Raises:
        FileExistsError: ``path`` is a file, or one of the two files there is not one that svdpeft has written.
        ValueError: a value is not finite; bases that cannot be left out.
    """
    path = Path(path)
    check_ours(path)
    reshard(contents.model.modules())  # or, after an evaluation, some weights are whole and this looks like one process
    tensors, header = _described(contents, bases)

    def write_files() -> None:
        with replacing(path / HEADER) as json_file, replacing(path / TENSORS) as tensors_file:
            save_file(tensors, tensors_file, metadata={HEADER: json.dumps(header)})
            json_file.write_text(_for_people(header))

    write_once(contents.model, write_files)


def to_state(contents: Contents) -> State:
    """Return what is written where all bases are stored: copies of the tensors, and the header."""
    tensors, header = _described(contents, "stored")
    return State({name: _copy(t) for name, t in tensors.items()}, {HEADER: json.dumps(header)})


def _for_people(header: Mapping[str, Any]) -> str:
    """A header as JSON, a line for each entry and for each site: one for each number would be thousands."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in header.items() if key != "sites"]
    sites = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in header["sites"].items())
    return "{\n" + "".join(f" {line},\n" for line in lines) + f' "sites": {{\n{sites}\n }}\n}}\n'


def _described(contents: Contents, bases: Bases) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is written: the adapter's own tensors, each in memory of its own, and the header."""
    names = {id(module): name for name, module in contents.model.named_modules()}
    for site in contents.sites.values():
        site.check_size()
    free = free_of(contents.sites.values())
    tensors: dict[str, Tensor] = {}
    sites: dict[str, Any] = {}
    left_out = derived(contents.sites, free, bases)
    small: dict[str, list[int]] = {}  # whole numbers that are packed, beside bases that are left out
    for (name, site), (factors, tied) in zip(contents.sites.items(), held(contents.sites).values(), strict=True):
        out = left_out.get(name)
        factors = {role: t for role, t in factors.items() if role not in (out or ())}
        for role, t in factors.items():
            if out is not None and t.dtype == torch.int64:
                small[f"{name}/{role}"] = list(t.shape)
            tensors[f"{name}/{role}"] = packed(t) if f"{name}/{role}" in small else _alone(t)
        base = site.weight.identity(free[id(site.weight)])
        sites[name] = {
            **_describe(site, names),
            "method": site.method.to_json(),
            "shape": list(site.weight.size),
            "dtype": str(site.weight.dtype),
            "hash": base.hash,
            "sample": base.sample,
            "tensors": {role: list(shape_of(t)) for role, t in factors.items()},
            "tied": tied,  # role -> the site, this one or an earlier one, that holds the tensor
        }
        if out is not None:
            sites[name]["derived"] = site.factors.origin.to_json(out)
    tensors |= {n: _alone(t) for n, t in contents.values.items()}
    if bad := [name for name, t in tensors.items() if not all_finite(t)]:
        raise ValueError(
            f"{bad[0]} holds values that are not finite{f', and {len(bad) - 1} more do' if len(bad) > 1 else ''}: the "
            "training has diverged, and nothing is written"
        )
    header = {
        "format": WITHOUT_BASES if left_out else FORMAT,
        "name": contents.name,
        "methods": [method.to_json() for _, method in contents.rules],
        "patterns": [pattern for pattern, _ in contents.rules],
        "sites": sites,
        "whole": list(contents.whole),
        "skipped": dict(contents.skipped),
        "batch_norm": contents.batch_norm,
        DIGESTS: {name: digest(tensor) for name, tensor in tensors.items()},
        **({"packed": small} if small else {}),
    }
    return tensors, identified(header)


def _alone(tensor: Tensor) -> Tensor:
    """All of a tensor; a copy where it lies among other values, which safetensors refuses to write."""
    whole = gathered(tensor).detach()
    return whole if whole.is_contiguous() and whole.untyped_storage().nbytes() == whole.nbytes else _copy(whole)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _describe(site: Site, names: Mapping[int, str]) -> dict[str, Any]:
    """The site's places, and which part of their weight it is."""
    places = [
        {"layer": names[id(place.module)], "parameter": place.parameter, **place.kind.to_json()}
        for place in site.places
    ]
    parts = [place.pop("part", None) for place in places]  # the same of every place
    return {"places": places, "part": None if parts[0] is None else {"name": site.part, **parts[0]}}
