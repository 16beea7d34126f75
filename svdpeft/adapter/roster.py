"""What adapters share: names in one model, what the base required gradients for before them, records of parameters."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from svdpeft.layers.cpu_layout import may_lose_gradients, pass_gradients
from svdpeft.sites.place import is_factor
from svdpeft.sites.site import Site
from svdpeft.sites.versions import Own, Versions
from svdpeft.sites.weights import BaseWeight, stored

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

    @property
    def own(self) -> Own:
        """Its versions of them, and of running statistics."""
        ...


M = TypeVar("M", bound=Member)


class Roster(Generic[M]):
    """The adapters of one model by name, and the flags of its parameters before the first came.

    Args:
        model: not adapted yet; parts of it, or what it is a part of, may be.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapters: dict[str, M] = {}
        self.versions = Versions(model)
        self.dequantised: Any = None  # what is put back when nothing is merged into a quantised model any more
        self._passing: RemovableHandle | None = None
        known = {id(p): other.required_grad[name] for other in rosters() for name, p in other.parameters()}
        # By all its names: a weight may be untied.
        base = ((name, p) for name, p in model.named_parameters(remove_duplicate=False) if not is_factor(name))
        self.required_grad = {name: known.get(id(p), p.requires_grad) for name, p in base}

    def enter(self) -> None:
        """Come into the model, before its first adapter, and see to its gradients."""
        setattr(self.model, ROSTER, self)
        if self._passing is None and may_lose_gradients(self.model):
            self._passing = self.model.register_forward_pre_hook(_pass_gradients)

    def replaced(self, layers: Iterable[nn.Module]) -> None:
        """Some layers hold integers now, which can have no gradient when the adapters have gone."""
        weights = {id(stored(layer, "weight")) for layer in layers}
        self.required_grad |= {name: False for name, p in self.parameters() if id(p) in weights}
        self.enter()

    def sites(self) -> list[Site]:
        """The sites of all adapters."""
        return [site for adapter in list(self.adapters.values()) for site in adapter.sites.values()]

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The base's parameters; the user may have replaced some since."""
        found = dict(self.model.named_parameters(remove_duplicate=False))
        return ((name, found[name]) for name in self.required_grad if name in found)

    def freeze(self) -> None:
        """Freeze the base but for what adapters train whole, of this model or of another that has the parameter."""
        whole = trained()
        for _, parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in whole)

    def release(self) -> None:
        """Give the flags back, but for parameters that the adapters of another model, or of a part of it, hold."""
        if self._passing is not None:
            self._passing.remove()
        others = [other for other in rosters() if other is not self]
        held = {id(p) for other in others for _, p in other.parameters()}
        for name, parameter in self.parameters():
            if id(parameter) not in held:
                parameter.requires_grad_(self.required_grad[name])
        for other in others:
            other.freeze()


def _pass_gradients(model: nn.Module, args: Any) -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        pass_gradients(model)


_live: dict[int, weakref.ref[Any]] = {}  # all adapters of the program: parts of one model may share parameters


def enlist(adapter: Any) -> None:
    """Know of an adapter as long as there is one."""
    _live[id(adapter)] = weakref.ref(adapter, functools.partial(_forget, id(adapter)))


def _forget(key: int, gone: weakref.ref[Any]) -> None:
    if _live.get(key) is gone:
        del _live[key]


def attached() -> list[Any]:
    """The adapters of whatever model that are attached to it, in any state."""
    known = (reference() for reference in list(_live.values()))  # a copy, made in one go: other threads make adapters
    return [adapter for adapter in known if adapter is not None and adapter.state != "detached"]


def rosters() -> list[Roster[Any]]:
    """The rosters of all adapters that are attached somewhere."""
    models = [adapter.model for adapter in attached()]
    return list(dict.fromkeys(vars(model)[ROSTER] for model in models if ROSTER in vars(model)))


def adapted() -> dict[int, Site]:
    """The parameters that adapters of whatever model adapt, by identity: one of their sites."""
    return {id(site.weight.stored): site for adapter in attached() for site in adapter.sites.values()}


def trained() -> dict[int, str]:
    """The parameters that adapters of whatever model train whole, by identity: their names there."""
    return {id(adapter.own[name]): name for adapter in attached() for name in adapter.whole}


def claimed(but: Roster[Any] | None = None) -> dict[int, str]:
    """What ``trained`` says, with the base's versions; without the adapters of one roster, which may share a name."""
    found = [adapter for other in rosters() if other is not but for adapter in other.adapters.values()]
    return {id(t): name for each in found for name in each.whole for t in (each.own[name], each.own.base(name))}


def untied() -> dict[int, str]:
    """The weights, by identity, that an adapter has untied to merge: the adapter's name."""
    return {id(each.shared): adapter.name for adapter in attached() for each in adapter.untied}


def held_elsewhere(roster: Roster[Any] | None) -> set[int]:
    """The tensors, by identity, of which adapters of other models, or of parts of one, have versions in theirs."""
    slots = (slot for other in rosters() if other is not roster for slot in other.versions.slots.values())
    return {id(stored(*slot.place)) for slot in slots}


def base_weight(owner: nn.Module, parameter: str, known: Mapping[int, Site]) -> BaseWeight:
    """The one record of a parameter, however many adapters write into it.

    Args:
        owner: the layer.
        parameter: its name there.
        known: what ``adapted`` says: another layer may have the same parameter, and an adapter of its own.
    """
    site = known.get(id(stored(owner, parameter)))
    return BaseWeight(owner, parameter) if site is None else site.weight


def records() -> Callable[[nn.Module, str], BaseWeight]:
    """``base_weight`` with what is adapted now."""
    return functools.partial(base_weight, known=adapted())


def adapters_in(model: nn.Module) -> list[Any]:
    """Return the adapters of a model and those of its parts."""
    rosters = [vars(module)[ROSTER] for module in model.modules() if ROSTER in vars(module)]
    return [adapter for roster in dict.fromkeys(rosters) for adapter in roster.adapters.values()]
