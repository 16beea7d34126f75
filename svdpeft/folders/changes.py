"""What adapters do to the tensors of a model that stays on the disk."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdpeft.adapter.attach import site_of
from svdpeft.adapter.checking import Parts, checked
from svdpeft.adapter.file import free_of
from svdpeft.decomposition import Product
from svdpeft.folders.skeleton import Skeleton
from svdpeft.layers.base import LayerKind
from svdpeft.sites.site import Site
from svdpeft.sites.weights import stored
from svdpeft.targets.inventory import users_of_parameters

BLOCK = 1 << 22  # values of an update at once: memory of that size is given back to the allocator, not to the system


@dataclass(frozen=True)
class Update:
    """What one site of one adapter adds to a weight.

    Args:
        weight: by which it is multiplied.
        site: of the adapter.
        entry: what its header says of the site.
        path: of the adapter.
        free: what of the weight the adapter has values of its own for.
    """

    weight: float
    site: Site
    entry: Mapping[str, Any]
    path: Path
    free: Sequence[LayerKind]


@dataclass
class Change:
    """What becomes of one tensor: updates are added to it, or versions take its place."""

    updates: list[Update] = field(default_factory=list)
    versions: list[tuple[float, Tensor]] = field(default_factory=list)

    def added(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Σ wᵢ ΔWᵢ of its updates, a few rows at a time: fewer bytes to fetch than the whole. As a whole where an
        update is no product, or not in the layout of the weight."""
        thin = [(update.weight, update.site.rowwise()) for update in self.updates]
        products = [Product(weight * p.scale * p.cored(), None, p.A) for weight, p in thin if p is not None]
        if len(products) < len(thin):
            yield slice(None), _sum(update.weight * update.site.delta().to(dtype) for update in self.updates)
            return
        m, n = products[0].L.shape[-2], products[0].A.shape[-1]
        step = max(BLOCK // n, 1)
        for rows in (slice(start, start + step) for start in range(0, m, step)):
            yield rows, _sum((p.L[rows] @ p.A).to(dtype) for p in products)

    def of(self, w: Tensor) -> Tensor:
        """W0 + Σ wᵢ (Wᵢ − W0) of its versions, or W0: at least float32, and of a count float64."""
        exact = w.to(torch.promote_types(w.dtype, torch.float32) if w.is_floating_point() else torch.float64)
        if not self.versions:
            return exact
        rest = 1 - sum(weight for weight, _ in self.versions)
        terms = [weight * version.to(exact.dtype) for weight, version in self.versions]
        return _sum(terms) + (rest * exact if rest else 0)  # so one version alone stays as it is


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """From the first term on: one alone is what it was, with -0."""
    return functools.reduce(torch.add, terms)


def changes(skeleton: Skeleton, adapters: Sequence[tuple[Path, float]]) -> dict[str, Change]:
    """Return what becomes of every tensor of the folder that an adapter changes, by its name there.

    Args:
        skeleton: of the model. Its embeddings grow where an adapter brings new tokens.
        adapters: the folder of each, and its weight.

    Raises:
        CheckpointError: an adapter that is none, or is for another model.
        ValueError: a tensor that the folder does not have as the model does, one that another layer has, too, or that
            one adapter adapts and another trains whole.
    """
    here = functools.cache(skeleton.record)
    for path, _ in adapters[1:] and adapters:  # once before the others are held against the model that one may let grow
        with checked(skeleton.model, path, check_base=False, weights=here):
            pass
    found: dict[int, Change] = {}  # by the identity of the model's tensor
    records: dict[int, Any] = {}
    for path, weight in adapters:
        with checked(skeleton.model, path, check_base=False, weights=here) as (header, parts):
            sites = _sites(skeleton, parts, records)
        free = free_of(sites)
        for site in sites:
            tensor = stored(site.places[0].module, site.places[0].parameter)
            update = Update(weight, site, header["sites"][site.name], path, free[id(site.weight)])
            found.setdefault(id(tensor), Change()).updates.append(update)
        tensors = skeleton.tensors()
        for name, version in parts.values.items():
            skeleton.filed_as(tensors[name])
            found.setdefault(id(tensors[name]), Change()).versions.append((weight, version))
    for change in found.values():
        if change.updates and change.versions:
            raise ValueError(f"one adapter adapts {change.updates[0].site.name}, and another trains it whole")
    tensors = skeleton.tensors()
    names = (name for name in skeleton.folder.entries if name in tensors)
    return {name: found[id(tensors[name])] for name in names if id(tensors[name]) in found}


def _sites(skeleton: Skeleton, parts: Parts, records: dict[int, Any]) -> list[Site]:
    """The sites of an adapter, each with the one record of its weight."""
    users, sites = users_of_parameters(skeleton.model), []
    for choice, method, factors in parts.built:
        place = choice.places[0]
        key = id(stored(place.module, place.parameter))
        mine = {(id(each.module), each.parameter) for each in choice.places}
        if len(mine) < len(users[key]):
            layers = " and ".join(name for name, _ in users[key])
            raise ValueError(
                f"{choice.name} cannot be merged: its weight is that of {layers}, of which one alone is adapted. "
                "Load the model, svdpeft.load() the adapter, and adapter.merge(permanent=True, untie=True)"
            )
        if key not in records:
            records[key] = skeleton.record(place.module, place.parameter)
        sites.append(site_of(choice, method, factors, records[key]))
    return sites
