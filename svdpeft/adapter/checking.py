"""An adapter that was read, held against the model that it is for: everything is checked before the model changes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from svdpeft.adapter.deriving import found_again
from svdpeft.adapter.file import (
    PLACE_KEYS,
    SITE_KEYS,
    TENSORS,
    CheckpointError,
    Source,
    free_parts,
    method_in,
    read,
    renamed,
    rounded,
    undamaged,
)
from svdpeft.adapter.fitting import fitted
from svdpeft.adapter.growing import Growth
from svdpeft.adapter.origin import Origin
from svdpeft.adapter.roster import records
from svdpeft.layers.base import LayerKind
from svdpeft.layers.heads import Heads
from svdpeft.layers.part import Part
from svdpeft.layers.quantised import weight
from svdpeft.methods.base import Factors, Method, PerSite, share
from svdpeft.registry import KINDS, near_miss
from svdpeft.sites.normalisation import running_statistics
from svdpeft.sites.place import Place
from svdpeft.sites.weights import BaseWeight, stored
from svdpeft.targets.choice import Choice
from svdpeft.targets.inventory import users_of_parameters


@contextmanager
def checked(
    model: nn.Module,
    source: Source,
    check_base: bool,
    rename: Mapping[str, str] = MappingProxyType({}),
    grows: bool = True,
    verify: bool = False,
    weights: Callable[[nn.Module, str], BaseWeight] | None = None,
) -> Iterator[tuple[dict[str, Any], Parts]]:
    """Read an adapter and hold it against the model: the header, and what ``install`` wants.

    The model stays as it is, but for embeddings that get rows for the adapter's new tokens; an error in the block takes
    that back, too.

    Args:
        model: that it is for.
        source: of the adapter.
        check_base: whether it must be the base of the adapter.
        rename: beginnings of the names in the source -> those of the model.
        grows: whether embeddings may get rows.
        verify: whether the source must be as it was written, bit for bit.
        weights: gives the record of a parameter, by its owner and its name there, for a model without values.

    Raises:
        CheckpointError: as ``load`` does.
    """
    header, tensors, path = read(source, verify)
    with undamaged(path, "the header of "):
        if rename:
            header, tensors = renamed(header, tensors, rename)
        growth = Growth.of(model, header, tensors, path) if grows else None
    with nullcontext() if growth is None else growth:
        with undamaged(path, "the header of "):
            parts = _parts(model, header, tensors, path, check_base, weights)
        yield header, parts


class Parts(NamedTuple):
    """What a file says, checked against the model: everything that ``install`` wants."""

    pairs: list[tuple[str, Method]]
    built: list[tuple[Choice, PerSite, Factors]]
    whole: dict[str, tuple[nn.Module, str]]
    values: dict[str, Tensor]


def _parts(
    model: nn.Module,
    header: dict[str, Any],
    tensors: dict[str, Tensor],
    path: Path,
    check_base: bool,
    weights: Callable[[nn.Module, str], BaseWeight] | None,
) -> Parts:
    if not isinstance(header["name"], str) or not header["name"] or "." in header["name"]:
        raise ValueError(f"the name is {header['name']!r}")
    if not isinstance(header["skipped"], dict) or header["batch_norm"] not in ("train", "frozen"):
        raise TypeError(f"skipped is {header['skipped']!r}, batch_norm {header['batch_norm']!r}")
    pairs = list(zip(header["patterns"], [method_in(entry, path) for entry in header["methods"]], strict=True))
    modules, users = dict(model.named_modules()), users_of_parameters(model)
    remaining, built, checked, record = dict(tensors), [], set(), functools.cache(records())
    other: list[tuple[str, str, str]] = []  # weights in another precision
    groups: dict[str, dict[str, Tensor]] = {}
    found: dict[str, Choice] = {}
    fitting: set[Hashable] = set()
    for site, entry in header["sites"].items():
        if missing := SITE_KEYS - entry.keys():
            raise KeyError(f"{site} lacks {', '.join(sorted(missing))}")
        method = method_in(entry["method"], path)
        if not isinstance(method, PerSite):
            raise ValueError(f"{site} has the method {method}, which adapts no site")
        places = [_place(modules, place, entry["part"], site, path) for place in entry["places"]]
        found[site] = Choice(site, places, method, "" if entry["part"] is None else entry["part"]["name"])
    free = free_parts(
        (id(stored(c.places[0].module, c.places[0].parameter)), c.method, c.places[0].kind) for c in found.values()
    )
    left_out = found_again(list(found.values()), header["sites"], weights or record, path)
    for site, entry in header["sites"].items():
        places, method = found[site].places, found[site].method
        first = places[0]
        parameter = stored(first.module, first.parameter)
        there = {(place["layer"], place["parameter"]) for place in entry["places"]}
        here = users[id(parameter)]
        alone = there < set(here) and all(place.can_call for place in places)  # the update is in its own output
        if set(here) != there and not alone:
            raise CheckpointError(f"{path}: the weight of {site} is used by {sorted(there)} there, {here} here")
        base = record(first.module, first.parameter)
        weight = base.original
        unseen = check_base and id(parameter) not in checked  # the parts of a fused weight have one hash
        if check_weight(site, entry, base, path, unseen, free[id(parameter)]):
            other.append((site, entry["dtype"], str(weight.dtype)))
        checked.add(id(parameter))
        both = {**left_out.get(site, {}), **_take(remaining, site, entry["tensors"], path)}  # in attach's order
        own = {role: t for role, t in both.items() if t is not None}
        tied = _tied(site, entry["tied"], own, method, groups)
        shape = first.kind.to_matrix(first.module, weight).shape
        factors = fitted(site, method, own, tied, shape, path, fitting)
        if site in left_out:
            factors.origin = Origin.from_json(entry["derived"], entry["sample"])
        built.append((found[site], method, factors))
    places, values = _whole_tensors(model, header, remaining, path)
    if remaining:
        raise CheckpointError(f"{path / TENSORS}: {len(remaining)} tensors have no place, such as {min(remaining)}")
    whole = {name: place for name, place in places.items() if name in header["whole"]}
    if twice := [name for name, place in whole.items() if id(stored(*place)) in checked]:
        raise CheckpointError(f"{path} trains {twice[0]} whole, and adapts it as well")
    keys = [(id(place.module), place.key_for("", choice.part)) for choice, *_ in built for place in choice.places]
    if len(set(keys)) < len(keys):
        raise CheckpointError(f"{path} has two sites at one place")
    warn_of_precision(path, other, stacklevel=6)
    return Parts(pairs, built, whole, values)


def warn_of_precision(path: Path, other: Sequence[tuple[str, str, str]], stacklevel: int) -> None:
    """Say that the base is in another precision.

    Args:
        path: of the adapter.
        other: the sites, each with the precision there and here.
        stacklevel: of the caller of who calls this.
    """
    if other:
        site, there, here = other[0]
        more = f", with {len(other) - 1} other weights" if len(other) > 1 else ""
        warnings.warn(
            f"{path} was made for a base in {there}, and {site} is in {here} here{more}: the values are the same up to "
            "rounding, and the adapted model's are those of the training up to that",
            stacklevel=stacklevel,
        )


def _take(remaining: dict[str, Tensor], site: str, shapes: dict[str, list[int]], path: Path) -> dict[str, Tensor]:
    """Take a site's tensors out of ``remaining``; each must be there in the shape that the header states."""
    taken = {}
    for role, shape in shapes.items():
        tensor = remaining.pop(f"{site}/{role}", None)
        if tensor is None or list(tensor.shape) != shape:
            found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
            raise CheckpointError(f"{path / TENSORS}: tensor {site}/{role} of shape {shape} is {found}")
        taken[role] = tensor.clone()  # in memory aligned as torch aligns it: its kernels may differ by that
    return taken


def _tied(
    site: str, tied: dict[str, str], own: dict[str, Tensor], method: PerSite, groups: dict[str, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What a site shares with others: taken out of its own tensors where it is the holder, else the holder's."""
    groups[site] = share({role: own.pop(role) for role, holder in tied.items() if holder == site}, method.trains)
    found, holders = {role: groups[holder][role] for role, holder in tied.items()}, set(tied.values())
    whole = groups[holders.pop()] if len(holders) == 1 else {}
    return whole if whole.keys() == found.keys() else found  # one mapping for all of a group, as attach makes it


def _place(
    modules: dict[str, nn.Module], entry: dict[str, Any], part: dict[str, Any] | None, site: str, path: Path
) -> Place:
    if missing := PLACE_KEYS - entry.keys():
        raise KeyError(f"{site} lacks {', '.join(sorted(missing))}")
    layer, parameter = entry["layer"], entry["parameter"]
    if layer not in modules or modules[layer]._parameters.get(parameter) is None:
        missing = f"{layer}.{parameter}" if layer in modules else layer
        known = modules if layer not in modules else [f"{layer}.{key}" for key in modules[layer]._parameters]
        raise CheckpointError(
            f"{path} adapts {site}, which this model does not have: {near_miss(missing, filter(None, known))}"
        )
    module = modules[layer]
    try:
        cls = KINDS[entry["kind"]]
    except ValueError as error:
        raise CheckpointError(f"the header of {path}: {error}") from error
    if not cls.fits(module, parameter):
        raise CheckpointError(f"{path}: {site} is a {type(module).__name__} here, not of kind {entry['kind']!r}")
    kind = cls.from_json(entry)
    if part is not None:
        rows = kind.to_matrix(module, weight(module, parameter)).shape[-2]
        if part["of"] != rows:
            raise CheckpointError(f"{path}: {site} is a part of {part['of']} rows there, of {rows} here")
    for view, fields in ((Part, part), (Heads, entry.get(Heads.word))):
        kind = kind if fields is None else view.of(kind, fields)
    return Place(module, parameter, kind)


def check_weight(
    site: str, entry: Mapping[str, Any], record: BaseWeight, path: Path, strict: bool, free: Sequence[LayerKind]
) -> bool:
    """Hold a weight of the model against what an adapter says of its own base.

    Args:
        site: of the adapter.
        entry: what its header says of the site.
        record: of the model's weight.
        path: of the adapter, for messages.
        strict: it must be the same weight, and not only of the same shape.
        free: what of it the adapter has values of its own for.

    Returns:
        Whether it is the one of the adapter in another precision.

    Raises:
        CheckpointError: it is another one.
    """
    weight = record.original
    if list(weight.shape) != entry["shape"]:
        raise CheckpointError(
            f"{path} was made for another base: {site} is {entry['shape']} there, {list(weight.shape)} here"
        )
    if not strict or record.known_by(entry["hash"], free):
        return False
    other = str(weight.dtype) != entry["dtype"]
    if other and "sample" in entry:
        dtypes = [weight.dtype, getattr(torch, entry["dtype"].removeprefix("torch."))]
        if rounded(entry["sample"], record.identity(free).sample, dtypes):
            return True
    dtypes = f" (saved for {entry['dtype']}, here {weight.dtype})" if other else ""
    raise CheckpointError(
        f"{path} was made for another base: the first weight that differs is {site}{dtypes}; check_base=False "
        "loads it all the same",
        entry["dtype"].removeprefix("torch.") if other else None,
    )


def _whole_tensors(
    model: nn.Module, header: dict[str, Any], remaining: dict[str, Tensor], path: Path
) -> tuple[dict[str, tuple[nn.Module, str]], dict[str, Tensor]]:
    """Take the tensors of the base out of ``remaining``: their places in the model and their values."""
    parameters = dict(model.named_parameters())
    places = running_statistics(model)
    for name in header["whole"]:
        if name not in parameters:
            raise CheckpointError(
                f"{path} trains {name}, which this model does not have: {near_miss(name, parameters)}"
            )
        owner, _, attribute = name.rpartition(".")
        places[name] = (model.get_submodule(owner), attribute)
    values = {name: remaining.pop(name) for name in list(remaining) if name in places}
    if missing := set(header["whole"]) - values.keys():
        raise CheckpointError(f"{path / TENSORS}: tensor {min(missing)} is missing")
    for name, value in values.items():
        here = stored(*places[name])
        if value.shape != here.shape:
            raise CheckpointError(f"{path}: {name} is {list(value.shape)} there, {list(here.shape)} in this model")
        values[name] = value.to(here.dtype)
    return places, values
