"""One use of a weight by one layer, and what that layer asks of the site that adapts it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from svdpeft.decomposition import Product
from svdpeft.layers.base import LayerKind
from svdpeft.methods.base import PerSite
from svdpeft.sites.rows import Rows
from svdpeft.sites.weights import BaseWeight

PLACES = "_svdpeft_places"  # plain attribute of an adapted layer: its places, in the order of attaching
CHILD = "svdpeft"  # name of the child module that holds a layer's factors, by adapter and parameter


def is_factor(name: str) -> bool:
    """Whether a dotted name, of a module or of a tensor, is one of an adapter's factors and none of the model's own.

    Example:
        >>> is_factor("fc.svdpeft.default:weight.L"), is_factor("fc.weight")
        (True, False)
    """
    return f".{CHILD}." in f".{name}."


@dataclass(eq=False)
class Place:
    """One use of a weight: most weights have one, a tied weight several.

    Args:
        module: the layer.
        parameter: name of the parameter there.
        kind: how this layer shows its weight.
    """

    module: nn.Module
    parameter: str
    kind: LayerKind
    can_call: bool = field(init=False)  # the layer's own forward is one that its hook can add to
    was_called: bool = field(init=False, default=False)  # by an eager forward
    was_read: bool = field(init=False, default=False)  # its weight, by an eager forward
    site: Answers = field(init=False, repr=False)
    key: str = field(init=False, default="")  # of the site's factors on this layer, once installed

    def __post_init__(self) -> None:
        self.can_call = self.kind.called(self.module)

    def key_for(self, adapter: str, part: str) -> str:
        """The name of an adapter's factors on the layer."""
        return f"{adapter}:{self.parameter}" + (f"[{part}]" if part else "")


def same_use(one: Sequence[Place], other: Sequence[Place]) -> bool:
    """Whether two sites are the same view of the same weight in the same layers."""
    uses = [
        {(id(p.module), p.parameter, json.dumps(p.kind.to_json(), sort_keys=True)) for p in ps} for ps in (one, other)
    ]
    return uses[0] == uses[1]


class Answers(Protocol):
    """What a layer asks of the site that adapts its weight, in its own call and where the weight is read."""

    name: str
    method: PerSite
    weight: BaseWeight
    active: bool
    folded: bool
    skips: bool

    def add(self, place: Place, x: Tensor, out: Tensor, own: Tensor | None, rows: Rows | None) -> Tensor:
        """Add the update to the layer's output, or to some rows of it."""
        ...

    @property
    def keeps_output(self) -> bool:
        """Say whether ``add`` makes a new tensor."""
        ...

    def replace(self, place: Place, x: Tensor) -> Tensor:
        """Give the layer's whole output."""
        ...

    def matrix(self, folded: bool) -> Tensor:
        """Give the update as matrices."""
        ...

    def base_matrix(self) -> Tensor:
        """Give W0 as matrices."""
        ...

    def prefers_dense(self, product: Product) -> bool:
        """Say whether building a product is cheaper than its factors."""
        ...

    def use_base(self) -> None:
        """Compute the layer from its weight again."""
        ...

    def check_size(self) -> None:
        """Refuse a weight that was resized."""
        ...

    def check_device(self, device: torch.device) -> None:
        """Refuse factors elsewhere."""
        ...

    def check_stepped(self, place: Place) -> None:
        """Refuse a training that leaves out the method's own step."""
        ...
