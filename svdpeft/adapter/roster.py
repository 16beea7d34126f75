"""What the adapters of one model share: each other's names, and what the base required gradients for before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

from torch import nn

from svdpeft.sites.place import is_factor
from svdpeft.sites.site import Site
from svdpeft.sites.weights import stored

ROSTER = "_svdpeft"  # plain attribute of an adapted model


class Member(Protocol):
    """An adapter, as far as the others of its model need to know it."""

    @property
    def sites(self) -> Mapping[str, Site]:
        """Its sites by name."""
        ...

    @property
    def whole(self) -> Mapping[str, tuple[nn.Module, str]]:
        """The parameters that it trains whole: name -> (owner, attribute)."""
        ...


M = TypeVar("M", bound=Member)


class Roster(Generic[M]):
    """The adapters of one model by name, and the flags of its parameters before the first came.

    Args:
        model: not adapted yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self.adapters: dict[str, M] = {}
        base = ((name, p) for name, p in model.named_parameters() if not is_factor(name))
        self.required_grad = {name: p.requires_grad for name, p in base}

    def sites(self) -> list[Site]:
        """The sites of all adapters."""
        return [site for adapter in self.adapters.values() for site in adapter.sites.values()]


def adapters_in(model: nn.Module) -> list[Any]:
    """Return the adapters of a model and those of its parts."""
    rosters = [vars(module)[ROSTER] for module in model.modules() if ROSTER in vars(module)]
    return [adapter for roster in dict.fromkeys(rosters) for adapter in roster.adapters.values()]


def set_requires_grad(model: nn.Module, roster: Roster) -> None:
    """Freeze the base but for what an adapter of the model, or of a part of it, trains whole."""
    trained = {id(stored(*place)) for adapter in adapters_in(model) for place in adapter.whole.values()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in roster.required_grad:
        if name in parameters:
            parameters[name].requires_grad_(id(parameters[name]) in trained)
