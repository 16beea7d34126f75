"""A batch whose rows use different adapters: which sites act on which of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from svdpeft.sites.place import PLACES
from svdpeft.sites.rows import Rows
from svdpeft.sites.site import Site


@contextmanager
def routed(model: nn.Module, mine: Mapping[Site, Rows]) -> Iterator[None]:
    """Within the block some sites act on their rows alone, and all other sites of the model on none.

    Args:
        model: whose forward will be called.
        mine: the sites that act, each with the rows of its adapter.

    Raises:
        RuntimeError: a weight that is read instead of called, an adapter that is merged or folded.
    """
    for site, its in mine.items():
        if site.read_only or not all(place.can_call for place in site.places):
            its.refuse_read(site.name)
    placed = {place.site: None for module in model.modules() for place in vars(module).get(PLACES, ())}
    for site in placed:  # of adapters of a larger model too
        if site.folded or site.weight.written(site):
            raise RuntimeError(f"an adapter is merged or folded at {site.name}: every row would have it")
    silenced = [site for site in placed if site.active and site not in mine]
    for site, its in mine.items():
        its.prepare(next(site.factors.parameters()).device)
    try:
        for site, its in mine.items():
            site.rows = its
        for site in silenced:
            site.active = False
        yield
    finally:
        for site in mine:
            site.rows = None
        for site in silenced:
            site.active = True
