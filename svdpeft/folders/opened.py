"""An adapter on the disk beside its model on the disk: all that an export reads, without the model in memory."""

from __future__ import annotations

import os
from collections.abc import Set
from pathlib import Path

from torch import nn

from svdpeft.adapter.attach import site_of
from svdpeft.adapter.checking import check_weight, checked, warn_of_precision
from svdpeft.adapter.file import free_of
from svdpeft.adapter.saving import Contents
from svdpeft.folders.folder import Folder
from svdpeft.folders.skeleton import Filed, Skeleton
from svdpeft.sites.weights import stored
from svdpeft.targets.inventory import users_of_parameters


def opened(base: str | os.PathLike[str], adapter: str | os.PathLike[str], check_base: bool = True) -> Contents:
    """Return what an adapter holds, its weights read from the model's folder one at a time, when they are asked for.

    Args:
        base: folder of the model, as for ``merge``.
        adapter: folder of the adapter.
        check_base: as for ``merge``.

    Returns:
        What ``svdpeft.export_lora`` and ``export_gguf`` take in the place of an attached adapter.

    Raises:
        ValueError: no such model, or a tensor that the folder has under another name than the model.
        CheckpointError: an adapter that is damaged, or was made for another base.

    Example:
        >>> svdpeft.export_lora(opened("llama", "math"), "math-lora")  # doctest: +SKIP
        Exported(path=PosixPath('math-lora'), ranks={'model.layers.0.self_attn.q_proj': 32, …}, …)
    """
    path, skeleton = Path(adapter), Skeleton(Folder(base))
    known: dict[int, Filed] = {}  # by the identity of the model's tensor: the sites of one weight share its record

    def record(owner: nn.Module, parameter: str) -> Filed:
        return known.setdefault(id(stored(owner, parameter)), skeleton.record(owner, parameter))

    with checked(skeleton.model, path, check_base=False, weights=record) as (header, parts):
        sites = {}
        for choice, method, factors in parts.built:
            place = choice.places[0]
            sites[choice.name] = site_of(choice, method, factors, record(place.module, place.parameter))
    free, others = free_of(sites.values()), []
    for name, site in sites.items():
        if check_weight(name, header["sites"][name], site.weight, path, check_base, free[id(site.weight)]):
            others.append((name, header["sites"][name]["dtype"], str(site.weight.dtype)))
    if others:
        warn_of_precision(path, others, stacklevel=2)
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in parts.values):
        _fill(skeleton, owner, {*parts.values}, known.keys())
    called, skipped = header["name"], header["skipped"]
    return Contents(
        called, skeleton.model, parts.pairs, sites, list(parts.whole), parts.values, skipped, header["batch_norm"]
    )


def _fill(skeleton: Skeleton, owner: str, values: Set[str], adapted: Set[int]) -> None:
    """Read what a layer has beside what was trained: other formats hold layers as wholes."""
    users = users_of_parameters(skeleton.model)
    for name in skeleton.model.get_submodule(owner).state_dict():
        layer, _, leaf = f"{owner}.{name}".removeprefix(".").rpartition(".")
        module = skeleton.model.get_submodule(layer)
        here = stored(module, leaf)
        if f"{layer}.{leaf}".removeprefix(".") in values or id(here) in adapted:
            continue
        value = skeleton.read(skeleton.filed_as(here))
        if leaf in module._buffers:
            module._buffers[leaf] = value
            continue
        made = nn.Parameter(value, requires_grad=False)
        for user, key in users[id(here)]:
            skeleton.model.get_submodule(user)._parameters[key] = made
