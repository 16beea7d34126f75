"""The reach check: which adapted weights a model never touches.

Calls and reads of a weight are noted where they happen (``sites``). After the first eager forward of the model, a site
that was not touched is named in a warning: it does not train, and a dead target would otherwise go unseen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from svdpeft.sites.site import Site

WATCH = "_svdpeft_watch"  # plain attribute of a model whose first forward is awaited: the hook's handle, and the sites
SHOWN = 5  # names in a warning


def watch(model: nn.Module, sites: Callable[[], Iterable[Site]]) -> None:
    """Look at all sites after the next eager forward of the model."""
    unwatch(model)
    setattr(model, WATCH, (model.register_forward_hook(_look), sites))


def unwatch(model: nn.Module) -> None:
    """Wait no longer."""
    if WATCH in vars(model):
        getattr(model, WATCH)[0].remove()
        delattr(model, WATCH)


def run_once(model: nn.Module, sites: Iterable[Site], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Call the model in evaluation mode and without gradients, so that its sites know whether it touches them."""
    for place in (place for site in sites for place in site.places):
        place.was_called = place.was_read = False
    unwatch(model)
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:  # and not eval(): what holds a layer's mode would take it for the user's wish
            module.training = False
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for module in training:
            module.training = True


def _look(model: nn.Module, args: Any, out: Any) -> None:
    if torch.compiler.is_compiling() or (watching := vars(model).pop(WATCH, None)) is None:
        return  # another thread looks
    handle, every = watching
    handle.remove()
    sites = list(every())
    for site in sites:
        if site.method.dropout and site.read_only:
            raise RuntimeError(
                f"dropout {site.method.dropout} at {site.name}: the model reads the weight instead of calling the "
                "layer, so the adapter has no input of its own to drop; attach with dropout=0, or leave it out"
            )
    lost = [site.name for site in sites if not site.reached]
    if lost:
        names = ", ".join(lost[:SHOWN]) + (", …" if len(lost) > SHOWN else "")
        warnings.warn(
            f"{len(lost)} adapted weights were not touched by the first batch and do not train on it: {names} "
            "(adapter.unreached lists them)",
            stacklevel=2,
        )
