"""The updates of an adapter as PEFT's LoRA holds them: one product for each weight, however many sites it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from svdpeft.adapter.saving import Contents
from svdpeft.decomposition import Product
from svdpeft.interop.lora import as_lora, check_finite
from svdpeft.interop.peft_layout import flipped, plain_convolution, to_peft
from svdpeft.layers.part import Part
from svdpeft.methods.whole import Whole
from svdpeft.sites.site import Site

MODULES = ("linear", "hf-conv1d", "conv", "conv-same", "embedding")  # kinds that PEFT adapts as layers
PARAMETERS = ("experts", "raw")  # as parameters, within their layer's own call
INSTEAD = "merge the adapter instead"


@dataclass(frozen=True)
class Update:
    """The update of one weight.

    Args:
        name: of the layer, or of the parameter where it is one of those that PEFT calls ``target_parameters``.
        layers: names of all layers that have the weight.
        site: one of its sites.
        product: (*b, m, r) and (*b, r, n), of scale one.
        lost: ‖ΔW − ΔW_r‖_F / ‖ΔW‖_F, what a rank that is too small leaves out.
    """

    name: str
    layers: tuple[str, ...]
    site: Site
    product: Product
    lost: float

    @property
    def parameter(self) -> str | None:
        """The parameter's name in its layer, where PEFT adapts it as one."""
        return self.site.places[0].parameter if self.site.kind.name in PARAMETERS else None

    def tensors(self) -> dict[str, Tensor]:
        """What PEFT keeps of each layer, by the tensor's name behind ``base_model.model.`` but for ``base_layer``."""
        found: dict[str, Tensor] = {}
        for layer, place in zip(self.layers, self.site.places, strict=True):
            left, right = self.product.L, self.product.A
            if isinstance(place.module, nn.Embedding):
                found |= {f"{layer}.lora_embedding_A": left.mT, f"{layer}.lora_embedding_B": right.mT}
                continue
            if place.kind.name in PARAMETERS:
                right, left = to_peft(place, left, right)
            elif isinstance(place.module, nn.modules.conv._ConvNd):
                kernel = place.module.weight.shape[1:]
                left, right = left[0].reshape(*left.shape[1:], *[1] * (len(kernel) - 1)), right[0].reshape(-1, *kernel)
            found |= {f"{layer}.lora_A.weight": right, f"{layer}.lora_B.weight": left}
        return {name: tensor.detach().contiguous().clone() for name, tensor in found.items()}


class Updates(NamedTuple):
    """What the sites of an adapter become.

    Args:
        updates: of weights.
        rows: layer -> the site of rows of its embedding, and all layers that have the weight.
        replaced: parameter -> its value, of sites that replace a weight as a whole.
    """

    updates: list[Update]
    rows: dict[str, tuple[Site, tuple[str, ...]]]
    replaced: dict[str, Tensor]


@torch.no_grad()
def updates_of(adapter: Contents, max_rank: int | None) -> Updates:
    """Sort the sites of an adapter into those.

    Raises:
        ValueError: there is no LoRA for one of them.
    """
    names = {id(module): name for name, module in adapter.model.named_modules()}
    weights: dict[int, list[Site]] = {}
    for site in adapter.sites.values():
        check_finite(site)
        weights.setdefault(id(site.weight), []).append(site)
    found = Updates([], {}, {})
    for uses in (uses for sites in weights.values() for uses in _by_use(sites)):
        first = uses[0]
        layers = tuple(names[id(place.module)] for place in first.places)
        if _is_rows(uses):
            found.rows[layers[0]] = first, layers
        elif isinstance(first.method, Whole) and not isinstance(first.kind, Part):
            for layer, place in zip(layers, first.places, strict=True):
                whole = place.kind.from_matrix(place.module, first.factors.W.detach())
                found.replaced[f"{layer}.{place.parameter}"] = whole.contiguous().clone()
        else:
            for site in uses:
                _check(site)
            product, lost = as_lora(uses, max_rank)
            name = first.name.removesuffix(f"[{first.part}]")
            found.updates.append(Update(name, layers, first, product, lost))
    return found


def _by_use(sites: list[Site]) -> list[list[Site]]:
    """Parts of one weight in the same layers belong together; a tied weight may be adapted for each layer apart."""
    groups: dict[tuple[int, ...], list[Site]] = {}
    for site in sites:
        groups.setdefault(tuple(id(place.module) for place in site.places), []).append(site)
    return list(groups.values())


def _is_rows(sites: list[Site]) -> bool:
    """Whether a site is what PEFT calls trainable tokens."""
    site = sites[0]
    embedding = any(isinstance(place.module, nn.Embedding) for place in site.places)
    return len(sites) == 1 and isinstance(site.method, Whole) and isinstance(site.kind, Part) and embedding


def _check(site: Site) -> None:
    name, module = site.name, site.places[0].module
    if site.kind.name not in (*MODULES, *PARAMETERS):
        raise ValueError(f"{name} is of kind {site.kind.name!r}: a LoRA file has no word for that; {INSTEAD}")
    if site.read_only and site.kind.name in MODULES:
        raise ValueError(f"the model reads {name} instead of calling it: a LoRA does nothing there; merge instead")
    if isinstance(module, nn.modules.conv._ConvNd):
        if site.shape[0] > 1:
            raise ValueError(
                f"{name} is a convolution of {site.shape[0]} groups: a LoRA file has no word for that; {INSTEAD}"
            )
        if not plain_convolution(module):
            raise ValueError(
                f"{name} is a convolution with a dilation or padding_mode={module.padding_mode!r}, which PEFT's own "
                f"does not have; {INSTEAD}"
            )
    if site.kind.name in PARAMETERS and flipped(site.places[0]) is None:
        raise ValueError(f"{name} is a parameter of other axes than PEFT knows; {INSTEAD}")
