"""A weight that is read: ``layer.weight`` of an adapted layer answers W0 + ΔW.

The layer gets a subclass of its own class, of the same name, with one property per adapted parameter. Within its
own call, where the hook adds the update, the property answers W0.
"""

from __future__ import annotations

import functools
import sys
import threading
from typing import Any

import torch
from torch import Tensor, nn

from svdpeft.decomposition import full_precision
from svdpeft.layers.quantised import Form
from svdpeft.sites.place import PLACES, Place
from svdpeft.sites.readers import means_parameter
from svdpeft.sites.rows import Rows
from svdpeft.sites.scope import scope

TRACED = "_svdpeft_traced"  # plain attribute of an adapted layer while a compiler traces its call
CALLED = "_svdpeft_called"  # plain attribute of an adapted layer while it is called eagerly
BASE = "_svdpeft_base"  # attribute of a class with reading properties: the class that it stands for


def adapted(weight: Tensor, places: list[Place]) -> Tensor:
    """Return W0 + ΔW of the given places in the weight's dtype; formed in at least float32 and rounded once."""
    with full_precision(weight):
        w = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if places[0].site.skips:  # the factors are the whole weight, which was left as it is
            w = torch.zeros_like(w)
        for place in places:
            place.site.check_device(weight.device)
            if not place.can_call:
                place.site.check_stepped(place)
            w = w + place.kind.from_matrix(place.module, place.site.matrix(place.site.folded))
        return w.to(weight.dtype)


class _Thread(threading.local):
    """What one thread is doing with layers whose weights are read."""

    def __init__(self) -> None:
        self.calls: dict[Any, list[dict[Any, Tensor]]] = {}  # layer -> what each of its running calls has computed
        self.forming: set[Any] = set()  # layers whose update is being formed: to their kind the weight is W0


_thread = _Thread()


def _plain(module: Any, parameter: str) -> Tensor | None:
    """The parameter itself, or what somebody (FSDP, a replica) has put in its place."""
    return module._parameters.get(parameter, vars(module).get(parameter))


def _read(module: Any, parameter: str) -> Tensor | None:
    """What ``module.<parameter>`` gives. Within the layer's own call its hook adds the update instead."""
    eager = not torch.compiler.is_compiling()
    weight = _plain(module, parameter)
    calls = _thread.calls.get(module, []) if eager else []
    # The call and what runs within it may be traced or not, each for itself.
    running = bool(calls) or getattr(module, TRACED, False) or (not eager and getattr(module, CALLED, False))
    asked = [p for p in getattr(module, PLACES, ()) if p.parameter == parameter and not (p.can_call and running)]
    if weight is None or not asked:  # as in every call of a layer with a hook
        return weight
    if eager and (module in _thread.forming or means_parameter(sys._getframe(2))):
        return weight
    places, here = [], scope() or {}
    for place in asked:
        if eager:
            place.was_read = True
        acts = here.get(place.site, place.site.active)
        if isinstance(acts, Rows):
            acts.refuse_read(place.site.name)
        if acts:
            places.append(place)
    if not places:
        return weight
    if not eager:  # a compiler finds the repeated computation itself
        return adapted(weight, places)
    if (how := Form(type(module), weight, {}).scheme) is not None:
        raise RuntimeError(
            f"the weight of {places[0].site.name} is quantised ({how}) and is read here, not called: W0 + ΔW cannot be "
            "given in the place of integers; leave the layer out with exclude="
        )
    # Experts read their weights once per expert: computed once per call. Under no_grad it has no graph.
    now = calls[-1] if calls else {}
    key = (parameter, torch.is_grad_enabled(), *((id(place), place.site.folded) for place in places))
    if key not in now:
        _thread.forming.add(module)
        try:
            now[key] = adapted(weight, places)
        finally:
            _thread.forming.remove(module)
    return now[key]


# -- the class of an adapted layer ------------------------------------------------------------------------------------


def undressed(module: Any) -> Any:
    """The layer's own class."""
    # In its own dictionary: a class that somebody derived from ours (FSDP does) is not ours to take away.
    return vars(type(module)).get(BASE, type(module))


def dress(module: Any) -> None:
    """Give the layer the class that answers for its adapted parameters, or its own if there are none."""
    base = undressed(module)
    parameters = tuple(sorted({place.parameter for place in getattr(module, PLACES, ())}))
    module.__class__ = _dressed(base, parameters) if parameters else base


@functools.cache
def _dressed(base: Any, parameters: tuple[str, ...]) -> Any:
    """A subclass that is called like the base class, so that whoever looks for a layer by its class name finds it."""

    def getter(parameter: str) -> property:
        def read(module: Any) -> Tensor | None:
            if parameter not in module._parameters and parameter not in vars(module):
                raise AttributeError(parameter)  # it was deleted; nn.Module's own __getattr__ is asked next
            try:
                return _read(module, parameter)
            except AttributeError as error:  # or Python would ask nn.Module.__getattr__, which knows W0 alone
                raise RuntimeError(f"the update of {parameter} cannot be formed: {error}") from error

        def write(module: Any, value: Any) -> None:
            vars(module)[parameter] = value

        def delete(module: Any) -> None:
            del vars(module)[parameter]

        return property(read, write, delete)

    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            setattr(module, TRACED, True)
            try:
                return base.__call__(module, *args, **kwargs)
            finally:
                delattr(module, TRACED)
        calls = _thread.calls.setdefault(module, [])
        calls.append({})
        vars(module)[CALLED] = True
        try:
            return base.__call__(module, *args, **kwargs)
        finally:
            calls.pop()
            if not calls:
                del _thread.calls[module]
                vars(module).pop(CALLED, None)

    def reduce(module: Any, protocol: Any) -> Any:
        # A class made here cannot be pickled by name: the base class and the parameters can.
        _, _, *state = base.__reduce_ex__(module, protocol)
        if state and isinstance(state[0], dict):  # a copy made within the layer's own call is not being called itself
            state[0] = {key: value for key, value in state[0].items() if key not in (CALLED, TRACED)}
        return (_new, (base, parameters), *state)

    body = {name: getter(name) for name in parameters}
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**body, **names, BASE: base, "__call__": call, "__reduce_ex__": reduce})


def _new(base: Any, parameters: tuple[str, ...]) -> nn.Module:
    module = base.__new__(base)
    module.__class__ = _dressed(base, parameters)
    return module
