"""Where the frozen tensors of a site come from: what its method was given, and by what they are known again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from svdpeft.decomposition.fingerprints import products
from svdpeft.methods.base import Factors, Given, PerSite


@dataclass(frozen=True)
class Origin:
    """What a method was given when it started at a site, apart from the weight.

    Args:
        name: of the site then.
        seed: of the site.
        origin: seed of the attachment.
        position: of the site among those of its method.
        roles: further names of the site.
        sample: values of the weight.
        products: frozen tensor -> its fingerprint; what sites share is the first one's.
        approximate: the weight was decomposed by the randomized driver: nothing is left out, and has a fingerprint.
    """

    name: str
    seed: int
    origin: int
    position: int
    roles: tuple[str, ...]
    sample: list[float]
    products: Mapping[str, list[float]]
    approximate: bool = False

    @classmethod
    def of(cls, given: Given, sample: list[float], frozen: Mapping[str, Tensor], approximate: bool) -> Origin:
        """Return the origin of a site that was just started."""
        found = {} if approximate else {role: products(tensor) for role, tensor in frozen.items()}
        return cls(given.name, given.seed, given.origin, given.position, given.roles, sample, found, approximate)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], sample: list[float]) -> Origin:
        """Return what ``to_json`` wrote."""
        return cls(**{**entry, "roles": tuple(entry["roles"])}, sample=sample)

    def to_json(self, left_out: Sequence[str]) -> dict[str, Any]:
        """Return all but the values of the weight, which a header has anyway, with the products of these tensors."""
        kept = {key: value for key, value in asdict(self).items() if key not in ("sample", "approximate")}
        return {**kept, "products": {role: self.products[role] for role in left_out}}


def frozen(method: PerSite, factors: Factors) -> dict[str, Tensor]:
    """The tensors of a site that stay what attaching made them, and are not whole numbers."""
    moving = {*factors.trains, *method.settable}
    return {
        role: tensor
        for role, tensor in factors.tensors().items()
        if role not in moving and tensor.is_floating_point() and tensor.numel()
    }
