"""A layer that is called: the hook that adds the updates into its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from svdpeft.layers.quantised import of_library
from svdpeft.sites.place import PLACES
from svdpeft.sites.rows import Rows
from svdpeft.sites.scope import scope

HOOK = "_svdpeft_hook"  # plain attribute: the handle of its hook


def add_updates(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    own = out  # what the layer itself has made of its input, until something is added to it in place
    compiling, here = torch.compiler.is_compiling(), scope() or {}
    for place in getattr(module, PLACES):
        if not place.can_call:
            continue
        if not compiling:
            place.was_called = True
        site = place.site
        acts = here.get(site, site.active)
        if acts and not site.skips:
            rows = acts if isinstance(acts, Rows) else None
            keeps = rows is None and site.keeps_output
            if compiling:
                out = site.add(place, _first(args, kwargs), out, own, rows)
            else:
                if out is own and not keeps and of_library(type(module)):
                    out = out.clone()
                try:
                    out = site.add(place, _first(args, kwargs), out, own, rows)
                except (IndexError, RuntimeError):
                    site.check_size()  # says more, if that is why
                    raise
            if not keeps:
                own = None
    return out


def without_base(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    place = next(place for place in getattr(module, PLACES) if place.site.skips)
    return place.site.replace(place, _first(args, kwargs))


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs["input"] if "input" in kwargs else next(iter(kwargs.values()))
