"""Making the factors of every site, one weight at a time; nothing of the model changes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from svdpeft.adapter.origin import Origin, frozen
from svdpeft.adapter.roster import records
from svdpeft.bars import bar
from svdpeft.decomposition import approximations, check_matrix, own_share_first, processes
from svdpeft.methods.base import Factors, Given, Partner, PerSite, Statistics, check_patterns, grouped, share
from svdpeft.registry import near_miss
from svdpeft.sites.weights import BaseWeight, sample
from svdpeft.targets.choice import Choice


def build(
    choices: Sequence[Choice], seed: int, clip: bool, calibration: Mapping[str, Statistics]
) -> list[tuple[Choice, PerSite, Factors]]:
    """Make the factors of every site; nothing of the model changes."""
    rules: dict[str, list[Given]] = {}  # the sites of each method: what else is adapted says nothing about them
    known: dict[str, Given] = {}
    record = records()
    for choice in choices:
        sites = rules.setdefault(repr(choice.method), [])
        known[choice.name] = given(choice, seed, calibration, record, len(sites))
        sites.append(known[choice.name])
    for choice in choices:
        _check_seen(choice, known[choice.name], calibration)
    methods = {repr(choice.method): choice.method for choice in choices}
    resolved: dict[str, PerSite] = {}
    shared: dict[str, dict[str, Tensor]] = {}
    for rule, sites in rules.items():
        found = methods[rule].resolve(sites, clip)
        check_patterns(methods[rule], [(site.name, site.roles) for site in sites])
        resolved |= {site.name: method for site, method in zip(sites, found, strict=True)}
        for one, group in grouped(found, sites).values():
            tied = share(one.share(group), one.trains)
            shared |= {site.name: tied for site in group}
    for choice in choices:
        _check_dropout(choice)
    made: dict[int, Factors] = {}
    approximate: dict[int, bool] = {}
    order = own_share_first(len(choices))  # beside other processes with the same folder of decompositions
    first = processes()[0] == 0  # which has a bar for all
    for i in bar(order, what="decompose", unit="site", hidden=not first):
        name = choices[i].name
        with approximations() as found:
            made[i] = resolved[name].factors(known[name].sharing(shared.get(name, {})))
        approximate[i] = bool(found)
    seen: set[int] = set()  # of shared tensors
    for i, choice in enumerate(choices):
        name, place = choice.name, choice.places[0]
        kept = frozen(resolved[name], made[i])
        mine = {role: t for role, t in kept.items() if id(getattr(made[i], role)) not in seen}
        seen |= {id(tensor) for tensor in shared.get(name, {}).values()}
        values = sample(record(place.module, place.parameter).original)
        made[i].origin = Origin.of(known[name], values, mine, approximate[i])
    return [(choice, resolved[choice.name], made[i]) for i, choice in enumerate(choices)]


def given(
    choice: Choice,
    seed: int,
    calibration: Mapping[str, Statistics],
    record: Callable[[nn.Module, str], BaseWeight] = BaseWeight,
    position: int = 0,
) -> Given:
    """What a method may know of a site. The weight is looked at when it is asked for, one at a time.

    Args:
        choice: the site.
        seed: of the attachment.
        calibration: what was seen of all sites.
        record: gives the record of a parameter, by its owner and its name there.
        position: of the site among those of its method.
    """
    place = choice.places[0]
    base = record(place.module, place.parameter)
    w = base.original  # of a quantised one a copy, which does not stay
    if w.is_meta and hasattr(place.module, "_hf_hook"):
        raise ValueError(
            f"{choice.name} is offloaded by accelerate (device_map, cpu_offload, disk_offload): its weight is in the "
            "layer while that is called, and at no other time, so that it cannot be decomposed, merged or known again. "
            "Keep what is adapted on a device, and offload other layers; or shard the weights over processes (FSDP2)"
        )
    check_matrix(w, choice.name, zero=True)  # a method that starts from the weight refuses zeros itself
    *batch, m, n = place.kind.to_matrix(place.module, w).shape
    dtype, device = torch.promote_types(w.dtype, torch.float32), w.device
    del w

    def weight() -> Tensor:
        return place.kind.to_matrix(place.module, base.original.to(dtype))

    partner = None
    if (half := choice.half) is not None:
        module, parameter, _, kind = half.partner
        other = record(module, parameter)
        check_matrix(other.original, f"the other weight of {choice.name}'s pair")
        partner = Partner(half.pair, lambda: kind.to_matrix(module, other.original.to(dtype)))
    site_seed = zlib.crc32(f"{seed}/{choice.name}".encode())
    shape = (math.prod(batch), m, n)
    seen = calibration.get(choice.name)
    return Given(choice.name, shape, site_seed, weight, choice.roles, seen, {}, position, seed, dtype, device, partner)


def _check_seen(choice: Choice, site: Given, calibration: Mapping[str, Statistics]) -> None:
    needs = choice.method.needs
    if needs and calibration and site.statistics is None:
        raise ValueError(
            f"the calibration saw nothing of {site.name}, whose {needs} {type(choice.method).__name__} starts from: "
            f"{near_miss(site.name, calibration)}; calibrate with the same targets, and exclude what is never called"
        )
    if needs:
        site.check_seen(needs, type(choice.method).__name__)


def _check_dropout(choice: Choice) -> None:
    method, place = choice.method, next((p for p in choice.places if not p.kind.called(p.module)), None)
    if method.dropout and place is not None:
        raise ValueError(
            f"dropout {method.dropout} at {choice.name}: the weight is read there and not called, and only in its "
            "layer's own call can an adapter drop anything; set dropout=0, or leave it out"
        )
