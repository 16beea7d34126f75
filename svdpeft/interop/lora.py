"""An adapter as the LoRA that other programs know: the exact update of each weight, and what has none."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.saving import Contents
from svdpeft.decomposition import Product, all_finite, truncated
from svdpeft.layers.part import Part
from svdpeft.methods.whole import Whole
from svdpeft.sites.site import Site


@torch.no_grad()
def as_lora(sites: Sequence[Site], max_rank: int | None = None) -> tuple[Product, float]:
    """Return the update ΔW = W' − W0 of one weight, on the *original* weight, in the balanced form U√Σ · √ΣVᵀ.

    Args:
        sites: of the weight: one, or parts of a fused one, whose updates are put side by side.
        max_rank: the nearest update of at most this rank; ``None`` is the exact one, of its exact rank.

    Returns:
        A product of the layer's whole matrices, with ``C`` ``None`` and ``scale`` 1, at least float32; and what it
        lacks, ‖ΔW − ΔW_r‖_F / ‖ΔW‖_F.

    Raises:
        ValueError: a method's update is no product, so that its rank is full, and there is no ``max_rank``.

    Example:
        >>> adapter = svdpeft.attach(torch.nn.ModuleDict({"qkv": torch.nn.Linear(4, 12)}), svdpeft.PiSSA(1), ["qkv[q]"])
        >>> lora, _ = as_lora(list(adapter.sites.values()))
        >>> lora.L.shape, lora.A.shape
        (torch.Size([12, 1]), torch.Size([1, 4]))
    """
    if max_rank is not None and (isinstance(max_rank, bool) or not isinstance(max_rank, int) or max_rank < 1):
        raise ValueError(f"max_rank {max_rank!r} is not a whole number of at least 1")
    parts = [site.kind.widen(_product(site, max_rank is not None)) for site in sites]
    left = torch.cat([part.cored() * part.scale for part in parts], -1)
    return truncated(Product(left, None, torch.cat([part.A for part in parts], -2)), max_rank)


def _product(site: Site, truncates: bool) -> Product:
    product = site.method.as_product(site.factors, site.base_matrix)
    if product is None:
        if not truncates and not (isinstance(site.method, Whole) and isinstance(site.kind, Part)):  # rows are few
            raise ValueError(
                f"{site.method} at {site.name} has an update of full rank: no LoRA can hold it; merge instead, or say "
                "max_rank= for the nearest one of a rank"
            )
        product = Product.of(site.matrix())
    return product.to(torch.promote_types(product.L.dtype, torch.float32))


def contents_of(adapter: Adapter | Contents) -> Contents:
    """What is written of an adapter that is attached, or of one that ``svdpeft.folders.opened`` gave."""
    return adapter.contents() if isinstance(adapter, Adapter) else adapter


def check_low_rank(adapter: Contents) -> None:
    """Refuse an adapter that is more than updates of matrices, or has diverged.

    Raises:
        ValueError: it has no factors, trains parameters whole, its training has changed statistics of normalisation
            layers, or a value is not finite.
    """
    if not adapter.sites:
        raise ValueError(f"adapter {adapter.name!r} has no factors: there is nothing to export")
    if adapter.whole:
        raise ValueError(f"{adapter.whole[0]} is trained whole: a LoRA file holds low-rank updates only; merge instead")
    if adapter.values:
        raise ValueError(
            f"training changed {next(iter(adapter.values))}: a LoRA file holds low-rank updates only; merge instead"
        )
    for site in adapter.sites.values():
        check_finite(site)


def check_finite(site: Site) -> None:
    """Refuse a site whose values are not all finite.

    Raises:
        ValueError: one is not.
    """
    if not all(map(all_finite, site.factors.tensors().values())):
        raise ValueError(f"{site.name} holds values that are not finite: the training has diverged")
