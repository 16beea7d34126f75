"""Loading an adapter file: everything is checked before the model changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.ambient import ordinary
from svdpeft.adapter.attach import install
from svdpeft.adapter.checking import Parts, checked
from svdpeft.adapter.deriving import check_same
from svdpeft.adapter.file import (
    CheckpointError,
    Source,
    free_of,
    held,
    method_in,
    read,
    undamaged,
)
from svdpeft.adapter.roster import ROSTER, held_elsewhere
from svdpeft.adapter.turns import prepares, turns
from svdpeft.sites.normalisation import running_statistics
from svdpeft.sites.shards import check_whole, gathered, reshard, shape_of, write
from svdpeft.sites.weights import stored
from svdpeft.targets.wrappers import unwrapped


@prepares
@ordinary()
def load(
    model: nn.Module,
    path: Source,
    name: str | None = None,
    check_base: bool = True,
    enabled: bool = True,
    rename: Mapping[str, str] = MappingProxyType({}),
    verify: bool = False,
) -> Adapter:
    """Attach a saved adapter to the base it was made for.

    Nothing is decomposed where the file holds the bases. Where it does not they are found again in the weights, which
    costs one decomposition per site, or the reading of it in an ``svd_cache`` block.

    Args:
        model: the base; unchanged if anything is wrong with the file.
        path: folder written by ``Adapter.save``, or one in which a training has left a folder ``adapter``; its file
            ``adapter.safetensors`` alone; or what ``Adapter.state_dict`` gave.
        name: of the adapter in this model; default the name it was saved under.
        check_base: refuse a base whose adapted weights differ in a single bit; the same weights in another precision
            are loaded with a warning. A file without bases is for the very weights alone, whatever is said here.
        enabled: ``False`` leaves it off, so that the model goes on computing what it did: with another adapter, say.
        rename: where the modules of this model have other names than those that it was saved from: beginnings of the
            names there -> here, ``{"model.": "backbone."}``.
        verify: compare every tensor, and the header, with the digests that were written with them: finds a bit that
            the disk or the network has turned.

    Raises:
        CheckpointError: no adapter there, a cut-off file, another format version, another base, a missing or extra
            tensor, a wrong shape, another digest; bases that do not come out as they were.
    """
    model = unwrapped(model)
    check_whole(model, "load")
    with checked(model, path, check_base, rename, verify=verify) as (header, parts):
        _check_statistics(model, parts)
        called = name or header["name"]
        with turns(model).change(f"loading adapter {called!r}"):
            adapter = install(
                model, parts.pairs, parts.built, parts.whole, header["skipped"], called, header["batch_norm"]
            )
            for tensor, value in adapter.own.holding(parts.values):  # and nothing of another adapter, which may be on
                write(tensor, value)
            if not enabled:
                adapter.disable()
    return adapter


@ordinary()
def restore(adapter: Adapter, path: Source) -> None:
    """Copy a saved adapter's tensors into this attached one: how a training run resumes.

    Raises:
        CheckpointError: the file has other methods, another base, other tensors or shapes; nothing was copied.
    """
    header, saved, path = read(path)
    reshard(adapter.model.modules())
    with undamaged(path, "the header of "):
        targets = _targets(adapter, header, saved, path)
    with adapter.unwritten():
        for tensor, value in targets:
            write(tensor, value)
    for site in adapter.sites.values():
        site.factors.settle()


def _targets(
    adapter: Adapter, header: Mapping[str, Any], saved: Mapping[str, Tensor], path: Path
) -> list[tuple[Tensor, Tensor]]:
    """The adapter's tensors, each with what it will hold; everything is checked."""
    free = free_of(adapter.sites.values())
    for name, site in adapter.sites.items():
        there = header["sites"].get(name, {})
        here = site.method.to_json()
        if there and (method := method_in(there["method"], path).to_json()) != here:
            changed = [key for key in here if method.get(key) != here[key]]
            raise CheckpointError(f"{path} was saved with another method at {name}: {', '.join(changed)} differs")
        if there and not site.weight.known_by(there["hash"], free[id(site.weight)]):
            raise CheckpointError(f"{path} was saved for another base: the weight of {name} differs")
    left_out = {name: entry["derived"]["products"] for name, entry in header["sites"].items() if "derived" in entry}
    factors = {}
    for name, (tensors, _) in held(adapter.sites).items():
        for role, tensor in tensors.items():
            if (expected := left_out.get(name, {}).get(role)) is None:
                factors[f"{name}/{role}"] = tensor
            else:
                check_same(name, role, gathered(tensor), expected, path)
    own = {name: adapter.own[name] for name in adapter.own.places if name in saved or name in adapter.whole}
    places = factors | own
    if places.keys() != saved.keys():
        other = min(places.keys() ^ saved.keys())
        raise CheckpointError(f"{path} was saved from another adapter: only one of them has the tensor {other}")
    for name, tensor in places.items():
        if shape_of(tensor) != tuple(saved[name].shape):
            raise CheckpointError(f"{path}: {name} is {list(saved[name].shape)} there, {list(shape_of(tensor))} here")
    values = {name: saved[name].to(tensor.dtype) for name, tensor in places.items()}
    return [*((tensor, values[name]) for name, tensor in factors.items()), *adapter.own.holding(values)]


def _check_statistics(model: nn.Module, parts: Parts) -> None:
    """Refuse statistics that an adapter of a part of the model, or of a larger one, has versions of."""
    places, elsewhere = running_statistics(model), held_elsewhere(getattr(model, ROSTER, None))
    for name in parts.values.keys() - parts.whole.keys():
        if id(stored(*places[name])) in elsewhere:
            raise CheckpointError(
                f"{name} is among the values, and an adapter that is attached to a part of this model, or to a larger "
                "one, has it already: attach both to the same"
            )
