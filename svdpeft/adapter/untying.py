"""One user of a tied weight that is adapted alone: merging gives it a weight of its own, or is refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from svdpeft.adapter.roster import attached
from svdpeft.sites.site import Site
from svdpeft.sites.weights import BaseWeight
from svdpeft.targets.inventory import users_of_parameters

FLAG = "tie_word_embeddings"  # of a configuration of transformers: by it weights are tied again when they are loaded


class Untied(NamedTuple):
    """What to give back.

    Args:
        site: that has a weight of its own.
        record: of the shared weight.
        shared: the weight.
        config: whose flag said that it is tied.
    """

    site: Site
    record: BaseWeight
    shared: Tensor
    config: Any


def shared_with(model: nn.Module, sites: Iterable[Site]) -> dict[str, str]:
    """The sites whose weight another layer has, too, that is not adapted with it: name -> that layer."""
    users, found = users_of_parameters(model), {}
    names = {id(module): name for name, module in model.named_modules()}
    for site in sites:
        mine = {(names.get(id(place.module)), place.parameter) for place in site.places}
        others = [name for name, key in users.get(id(site.weight.stored), []) if (name, key) not in mine]
        if others:
            found[site.name] = others[0]
    return found


def check_not_shared(model: nn.Module, sites: Sequence[Site], what: str) -> None:
    """Refuse to write into a weight that another layer has, too.

    Raises:
        ValueError: a site is one of several users of its weight.
    """
    for name, other in shared_with(model, sites).items():
        raise ValueError(
            f"{name} cannot be {what}: {other} has the same weight and is not adapted: it would change as well. "
            "merge(untie=True) gives it a weight of its own"
        )


@torch.no_grad()
def untie(model: nn.Module, sites: Iterable[Site]) -> list[Untied]:
    """Give those sites a weight of their own, a copy.

    Raises:
        ValueError: another adapter has the weight, too.
    """
    sites, done = list(sites), []
    alone = shared_with(model, sites)
    everywhere = [site for adapter in attached() for site in adapter.sites.values()]
    for site in sites:
        if site.name in alone and any(other.weight is site.weight and other is not site for other in everywhere):
            raise ValueError(f"{site.name} cannot be untied: another adapter adapts the weight, too; detach it first")
    inputs = getattr(model, "get_input_embeddings", lambda: None)()
    for site in sites:
        if site.name not in alone:
            continue
        shared, record = site.weight.stored, site.weight
        own = nn.Parameter(record.original.clone(), requires_grad=False)
        config = getattr(model, "config", None)
        tied = inputs is not None and getattr(inputs, "weight", None) is shared and getattr(config, FLAG, False)
        for place in site.places:
            place.module._parameters[place.parameter] = own
        site.weight = BaseWeight(site.places[0].module, site.places[0].parameter)
        if tied:
            setattr(config, FLAG, False)
        done.append(Untied(site, record, shared, config if tied else None))
    return done


def tie_again(untied: Iterable[Untied]) -> None:
    """Give back the weight that is shared."""
    for each in untied:
        for place in each.site.places:
            place.module._parameters[place.parameter] = each.shared  # type: ignore[assignment]
        each.site.weight = each.record
        if each.config is not None:
            setattr(each.config, FLAG, True)
