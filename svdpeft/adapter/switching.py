"""Sites go from one state to another together, or not at all."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from svdpeft.sites.site import Site
from svdpeft.sites.weights import MergeReport

WAYS = {  # out of the states in which nothing of an adapter can be turned or trained
    "merged": "unmerge() it first",
    "disabled": "enable() it first, or leave the block",
    "in a per_example block": "leave the block first",
    "detached": "attach or load it again",
}


@torch.no_grad()
def go(sites: Sequence[Site], state: str) -> MergeReport:
    """Take every site from "attached" to "merged" or "folded", or back; what interrupts it leaves all of them attached.

    Returns:
        What rounding took, where they were merged.
    """
    lost: dict[str, float] = {}
    try:
        for site in sites:
            try:
                lost[site.name] = site.go(state)
            except ValueError as error:
                raise ValueError(f"{site.name} cannot be {state}: {error}") from error
    except BaseException:  # out of memory, or Ctrl-C: half of the sites must not stay merged
        for site in sites:
            site.go("attached")
        raise
    return MergeReport(lost)


def check_there(
    model: nn.Module, sites: Iterable[Site], whole: Mapping[str, tuple[nn.Module, str]] = MappingProxyType({})
) -> None:
    """Refuse an adapter of layers that have left the model: somebody has replaced a head, say.

    Raises:
        RuntimeError: the layer of a site, or of a parameter that trains whole, is no longer in the model.
    """
    modules = set(model.modules())
    gone = [site.name for site in sites if not modules.issuperset(site.owners)]
    gone += [name for name, (owner, _) in whole.items() if owner not in modules]
    if gone:
        raise RuntimeError(
            f"{gone[0]}: its layer is no longer in the model, which has another in its place: what the adapter "
            "has learned there acts on nothing. Detach it, and attach or load it to the new model"
        )


def check_foldable(sites: Iterable[Site]) -> None:
    """Raise ``ValueError`` where folding would change what is computed, or another layer."""
    for site in sites:
        if site.method.dropout:
            raise ValueError(
                f"dropout {site.method.dropout} at {site.name}: folded, it would also drop the part of W0 that the "
                "factors took over; fold() needs dropout=0"
            )
        if len(site.places) > 1:
            raise ValueError(f"{site.name} shares its weight with other layers: folding is refused there")
        if (how := site.weight.scheme) is not None:
            raise ValueError(
                f"{site.name} is quantised ({how}): W0 − [L C A]start would be rounded to that again. svdpeft.quantize "
                "folds the start out of a model before it is quantised"
            )


def check_no_transform_beside(sites: Iterable[Site], all_sites: Iterable[Site]) -> None:
    """The change of a method outside the equation depends on W0: a new base would silently change it.

    Args:
        sites: whose update will become part of the base for good.
        all_sites: of the model.
    """
    mine = set(sites)
    weights = {id(site.weight) for site in mine}
    for site in all_sites:
        if site not in mine and id(site.weight) in weights and site.method.product(site.factors) is None:
            raise ValueError(
                f"another adapter transforms the weight of {site.name} ({site.method}): it changes the base as that "
                "is, so that no other change can become part of that for good. For a plain model with both, merge() "
                "both and take merged_state_dict(); else detach that one"
            )


def guard_loading(model: nn.Module, adapter: Any) -> RemovableHandle:
    """Refuse weights of the base that come in while others are written there: they would be gone afterwards."""
    return model.register_load_state_dict_pre_hook(functools.partial(_refuse_loading, adapter))


def _refuse_loading(adapter: Any, model: nn.Module, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    if adapter.state not in ("merged", "folded"):
        return
    owners = {owner for site in adapter.sites.values() for owner in site.owners}
    for name, module in model.named_modules(prefix=prefix.rstrip(".")):
        if module in owners and (lost := next((key for key in module._parameters if f"{name}.{key}" in state), None)):
            raise RuntimeError(
                f"adapter {adapter.name!r} is {adapter.state}, and {name}.{lost} would be undone when it no longer is: "
                f"{'unmerge' if adapter.state == 'merged' else 'unfold'}() it before weights of the base are loaded"
            )
