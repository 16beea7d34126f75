"""Adapter files without frozen bases: which sites can be saved so, and how their bases are found again at load.

What a method makes of a weight, it makes again of the same weight. The file holds what trains, what the method was
given (``Origin``), the hash of the weight, and a fingerprint of every tensor that it leaves out. At load the method
starts anew; where the weight is another one, or the fingerprints do not agree, nothing is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from svdpeft.adapter.building import given
from svdpeft.adapter.file import CheckpointError, free_of, held
from svdpeft.adapter.origin import Origin, frozen
from svdpeft.bars import bar
from svdpeft.decomposition.fingerprints import agrees
from svdpeft.layers.base import LayerKind
from svdpeft.methods.base import Given, share
from svdpeft.registry import near_miss
from svdpeft.sites.shards import count, sharded
from svdpeft.sites.site import Site
from svdpeft.sites.weights import BaseWeight
from svdpeft.targets.choice import Choice

Bases = Literal["auto", "stored", "derived"]
BASES = ("auto", "stored", "derived")
SHARE = 0.25  # of the bytes of the weights: what takes more is left out by "auto"


def derived(
    sites: Mapping[str, Site], free: Mapping[int, Sequence[LayerKind]], bases: Bases, sure: bool = True
) -> dict[str, list[str]]:
    """Return the sites that are saved without their frozen tensors, and which tensors these are.

    The sites of one method go the same way.

    Args:
        sites: of the adapter.
        free: what of the weights does not matter to it, by weight.
        bases: ``"auto"``, ``"stored"`` or ``"derived"``.
        sure: look at every weight and frozen tensor, whether it is still what it was; a summary need not.

    Raises:
        ValueError: another word; ``"derived"``, and the bases of a site cannot be found again.
    """
    if bases not in BASES:
        raise ValueError(f"bases {bases!r} is not one of {', '.join(BASES)}: {near_miss(bases, BASES)}")
    mine = {name: factors for name, (factors, _) in held(sites).items()}
    rules: dict[str, list[str]] = {}
    for name, site in sites.items():
        rules.setdefault(repr(site.method.general()), []).append(name)
    found: dict[str, list[str]] = {}
    for names in [] if bases == "stored" else rules.values():
        out = {name: [r for r in frozen(sites[name].method, sites[name].factors) if r in mine[name]] for name in names}
        if not any(out.values()) or (bases == "auto" and not _thick(sites, out)):
            continue
        reasons = ((name, _reason(sites[name], free[id(sites[name].weight)], out[name], sure)) for name in names)
        name, why = next(((name, why) for name, why in reasons if why), ("", ""))
        if not why:
            found |= out
        elif bases == "derived":
            raise ValueError(f"the bases of {name} cannot be left out of a file: {why}; save(bases='stored')")
    return found


def cost(sites: Mapping[str, Site]) -> str:
    """What a load of the adapter costs where it is saved as it is by default, in a sentence; empty: nothing."""
    left_out = derived(sites, free_of(sites.values()), "auto", sure=False)
    matrices = sum(sites[name].shape[0] for name in left_out)
    if not matrices:
        return ""
    return (
        f"saved without the bases of {len(left_out)} sites: a load finds them again in {matrices} decompositions, "
        "which an svd_cache keeps; save(bases='stored') keeps them in the file"
    )


def _thick(sites: Mapping[str, Site], out: Mapping[str, list[str]]) -> bool:
    """Whether frozen bases, which are no start values, take more than a share of the bytes of their weights."""
    weights, bases = 0, 0
    for name, roles in out.items():
        site = sites[name]
        starts = {f"{role}0" for role in site.factors.trains}
        tensors = [site.factors.get_parameter(role) for role in roles if role not in starts]
        bases += sum(count(t) * t.element_size() for t in tensors)
        batch, m, n = site.shape
        weights += batch * m * n * site.weight.dtype.itemsize
    return bases > SHARE * weights


def _reason(site: Site, free: Sequence[LayerKind], roles: Sequence[str], sure: bool) -> str:
    """Why a site's frozen tensors cannot be found again; empty where they can."""
    origin: Origin | None = site.factors.origin
    if site.method.needs or site.method.pairs:
        return f"{site.method} starts from more than the weight"
    if sharded(site.weight.stored) or any(sharded(getattr(site.factors, role)) for role in roles):
        return "it is sharded over processes"
    if origin is None:
        return "this adapter was not attached, but came from a file or another adapter with all its tensors"
    if origin.approximate:
        return "the randomized driver finds slightly other ones on another machine; attach with driver='exact'"
    if free:
        return "values of its weight are another site's, and change"
    if not sure:
        return ""
    if origin.sample != site.weight.identity().sample:
        return "its weight has changed since it was adapted"
    if not all(agrees(getattr(site.factors, role), origin.products.get(role, ())) for role in roles):
        return "they are not what attaching made any more"
    return ""


def check_base(site: str, entry: Mapping[str, Any], record: BaseWeight, path: Path) -> None:
    """Refuse bases that would be found in another weight.

    Raises:
        CheckpointError: a single bit of it differs.
    """
    if not record.known_by(entry["hash"]):
        here, there = str(record.original.dtype), entry["dtype"]
        dtypes = f" (saved for {there}, here {here})" if here != there else ""
        raise CheckpointError(
            f"{path} holds no bases: they are found in the very weights that it was made for, and {site} is another "
            f"one{dtypes}. Load it on its own base, and there adapter.save(…, bases='stored')",
            there.removeprefix("torch.") if dtypes else None,
        )


def found_again(
    choices: Sequence[Choice],
    entries: Mapping[str, Mapping[str, Any]],
    record: Callable[[nn.Module, str], BaseWeight],
    path: Path,
) -> dict[str, dict[str, Tensor | None]]:
    """Return the frozen tensors that a file has left out, by site and name; ``None`` stands for those that it holds.

    Args:
        choices: the sites of the file.
        entries: what its header says of them.
        record: gives the record of a parameter, by its owner and its name there.
        path: of the file, for messages.

    Raises:
        CheckpointError: another weight, or other tensors; the message names the site.
    """
    mine = [choice for choice in choices if "derived" in entries[choice.name]]
    for choice in mine:
        place = choice.places[0]
        check_base(choice.name, entries[choice.name], record(place.module, place.parameter), path)
    groups: dict[str, list[Choice]] = {}
    for choice in mine:
        for holder in set(entries[choice.name]["tied"].values()):
            groups.setdefault(holder, []).append(choice)
    shared: dict[str, dict[str, Tensor]] = {}
    for group in groups.values():
        method = group[0].method
        tied = share(method.share([_given(c, entries[c.name], record, path) for c in group]), method.trains)
        shared |= {choice.name: tied for choice in group}
    found: dict[str, dict[str, Tensor | None]] = {}
    for choice in bar(mine, what="decompose", unit="site"):
        start = _given(choice, entries[choice.name], record, path).sharing(shared.get(choice.name, {}))
        try:
            tensors = choice.method.factors(start).tensors()
        except ValueError as error:
            raise CheckpointError(f"{path}: the bases of {choice.name} cannot be found again: {error}") from error
        found[choice.name] = dict.fromkeys(tensors)
        for role, expected in entries[choice.name]["derived"]["products"].items():
            check_same(choice.name, role, tensors[role], expected, path)
            found[choice.name][role] = tensors[role]
    return found


def check_same(site: str, role: str, tensor: Tensor, expected: Sequence[float], path: Path) -> None:
    """Refuse a tensor that is not the one that a file has left out.

    Raises:
        CheckpointError: it is another one.
    """
    if not agrees(tensor, expected):
        raise CheckpointError(
            f"{path}: {site}/{role} comes out otherwise here than where it was saved, though the weight is the same: "
            "another version of torch or of its solver. Load it there, and adapter.save(…, bases='stored')"
        )


def _given(
    choice: Choice, entry: Mapping[str, Any], record: Callable[[nn.Module, str], BaseWeight], path: Path
) -> Given:
    origin = Origin.from_json(entry["derived"], entry["sample"])
    return dataclasses.replace(
        given(choice, 0, {}, record),
        name=origin.name,
        seed=origin.seed,
        origin=origin.origin,
        position=origin.position,
        roles=origin.roles,
    )
