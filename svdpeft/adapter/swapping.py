"""Another adapter's values in the place of an attached one's, in the same tensors.

Nothing is attached, so a model that is compiled or in a CUDA graph goes on as it is. Where methods and ranks are the
same the tensors are copied. Into a LoRA goes any adapter whose update is a product of at most its rank:

    L ← [s′ L′C′ / s | 0]        A ← [A′ ; 0]        s′ L′C′A′ = ΔW of the other adapter, s = α/r of the LoRA
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from svdpeft.adapter.checking import Parts, checked
from svdpeft.adapter.file import CheckpointError, Source
from svdpeft.decomposition import EXACT, all_finite, exact_rank, recompress
from svdpeft.methods.base import Factors, PerSite
from svdpeft.methods.lora import LoRA
from svdpeft.sites.place import same_use
from svdpeft.sites.shards import check_whole
from svdpeft.sites.site import Site
from svdpeft.sites.versions import Own


def swap_in(
    model: nn.Module,
    sites: Mapping[str, Site],
    own: Own,
    source: Source,
    check_base: bool,
    unwritten: Callable[[], AbstractContextManager[None]],
) -> None:
    """What ``Adapter.load_state_dict`` does: everything is checked before a tensor changes.

    Args:
        model: that the adapter is attached to.
        sites: of the adapter.
        own: its versions of the base's tensors.
        source: of the values.
        check_base: whether they must be of this base.
        unwritten: a block within which nothing is written in the base weights.

    Raises:
        CheckpointError: as ``load`` does; a site or a whole parameter that the adapter does not have; an update that
            it cannot hold.
    """
    check_whole(model, "load the values")
    with checked(model, source, check_base, grows=False) as (_, parts):
        values = _plan(sites, parts)
    whole = own.places.keys() - set(own.statistics)
    if extra := parts.values.keys() - own.places.keys() or parts.whole.keys() - whole:
        raise CheckpointError(f"the values have {min(extra)}, which the attached adapter does not train whole")
    values += own.holding(parts.values)
    if bad := [value for _, value in values if not all_finite(value)]:
        raise CheckpointError(f"the values are not finite, of {len(bad)} tensors: the training has diverged")
    before = [(target, target.clone()) for target, _ in values]
    try:
        with unwritten(), torch.no_grad():
            for target, value in values:
                target.copy_(value)
    except BaseException:  # they cannot be merged, say
        with torch.no_grad():
            for target, value in before:
                target.copy_(value)
        raise
    for site in sites.values():
        site.factors.settle()


def _plan(sites: Mapping[str, Site], parts: Parts) -> list[tuple[Tensor, Tensor]]:
    """The tensors of the attached adapter, each with what it will hold."""
    there = {choice.name: (method, factors) for choice, method, factors in parts.built}
    for choice, _, _ in parts.built:
        if choice.name in sites and not same_use(choice.places, sites[choice.name].places):
            raise CheckpointError(
                f"{choice.name} is another use, or another view, of its weight in the attached adapter"
            )
    if extra := there.keys() - sites.keys():
        raise CheckpointError(f"the values have a site {min(extra)}, which the attached adapter does not have")
    plan = []
    for name, site in sites.items():
        here = site.factors.tensors()
        if name not in there:
            if type(site.method) is not LoRA:
                raise CheckpointError(f"the values have no site {name}, and only a LoRA can be without an update there")
            plan.append((here["L"], torch.zeros_like(here["L"])))
            continue
        method, factors = there[name]
        new = factors.tensors()
        if method.to_json() == site.method.to_json() and {k: t.shape for k, t in new.items()} == {
            k: t.shape for k, t in here.items()
        }:
            plan += [(here[role], tensor) for role, tensor in new.items()]
        else:
            plan += _as_lora(name, site, method, factors)
    return plan


@torch.no_grad()
def _as_lora(name: str, site: Site, method: PerSite, factors: Factors) -> list[tuple[Tensor, Tensor]]:
    if not isinstance(site.method, LoRA):
        raise CheckpointError(
            f"the values at {name} are of {method}, and {site.method} is attached there: attach LoRA(rank=…), which "
            "holds the update of any method up to its rank, and load the values into that"
        )
    product = method.as_product(factors, site.base_matrix)
    if product is None:
        raise CheckpointError(f"{method} at {name} has an update of full rank: no LoRA can hold it")
    left, right = (site.factors.tensors()[role] for role in "LA")
    room = left.shape[-1]
    if product.rank > room:
        if (rank := int(exact_rank(product, EXACT).max())) > room:
            raise CheckpointError(
                f"{method} at {name} has an update of rank {rank}, and {site.method} has room for {room}"
            )
        product = recompress(product, EXACT)
    filled = torch.zeros_like(left), torch.zeros_like(right)
    filled[0][..., : product.rank] = product.cored() * (product.scale / site.method.scale)
    filled[1][..., : product.rank, :] = product.A
    return list(zip((left, right), filled, strict=True))
