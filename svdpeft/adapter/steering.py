"""Turning an adapter while the model runs: what a method lets be set is one frozen value per site, written in place.

A compiled model reads it like any other parameter, so it follows without being compiled again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real

import torch

from svdpeft.registry import near_miss
from svdpeft.sites.site import Site


@torch.no_grad()
def write(sites: Iterable[Site], values: Mapping[str, float]) -> None:
    """Write each value at every site whose method has it; nothing is written where one of them is refused.

    Raises:
        ValueError: no method of the sites has such a name, or a value is not a finite number.
    """
    sites = list(sites)
    known = {name for site in sites for name in site.method.settable}
    found = []
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"no method of this adapter lets {name!r} be set: {near_miss(name, known)}")
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{name}={value!r} is not a finite number")
        for site in (site for site in sites if name in site.method.settable):
            tensor = getattr(site.factors, name)
            if abs(value) > torch.finfo(tensor.dtype).max:
                raise ValueError(f"{name}={value!r} is infinite in {tensor.dtype}, the dtype of {site.name}")
            found.append((tensor, value))
    for tensor, value in found:
        tensor.fill_(value)
