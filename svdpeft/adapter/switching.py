"""Sites go from one state to another together, or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from svdpeft.sites.site import Site
from svdpeft.sites.weights import MergeReport


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


def check_there(model: nn.Module, sites: Iterable[Site]) -> None:
    """Refuse an adapter of layers that have left the model: somebody has replaced a head, say.

    Raises:
        RuntimeError: the layer of a site is no longer in the model.
    """
    modules = set(model.modules())
    for site in sites:
        if not modules.issuperset(site.owners):
            raise RuntimeError(
                f"{site.name}: its layer is no longer in the model, which has another in its place: what the adapter "
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
                f"another adapter transforms the weight of {site.name} ({site.method}): with another base "
                "it would no longer be what was trained; merge or detach that one first"
            )
