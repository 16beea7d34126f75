"""A quantised model with plain weights in the place of its quantised ones, for as long as something is merged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from svdpeft.adapter.roster import Roster, adapted
from svdpeft.layers.quantised import Form, form_of
from svdpeft.layers.quantising import plain, put, quantised_in
from svdpeft.sites.reads import dress, undressed
from svdpeft.sites.weights import BaseWeight, stored

MARKS = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
CONFIG = "quantization_config"  # of a model's configuration: by it a folder is loaded as a quantised one


def change_form(module: nn.Module, parameter: str, form: Form) -> Form:
    """Let a layer, adapted or not, store a weight in another form; return the one before."""
    before = form_of(module, parameter)._replace(cls=undressed(module))
    put(module, parameter, form)
    dress(module)
    return before


@dataclass
class Dequantised:
    """What is put back when nothing is merged any more.

    Args:
        layers: each with the name of its weight, its form before, and the record of the weight where it is adapted.
        marks: what transformers says of a quantised model: owner, name, value.
    """

    layers: list[tuple[nn.Module, str, Form, BaseWeight | None]] = field(default_factory=list)
    marks: list[tuple[Any, str, Any]] = field(default_factory=list)

    def undo(self) -> None:
        """Put the quantised weights back."""
        for module, parameter, before, record in self.layers:
            change_form(module, parameter, before)
            if record is not None:
                record.quantised = None
        for owner, name, value in self.marks:
            vars(owner)[name] = value


@torch.no_grad()
def dequantise(roster: Roster[Any], dtype: torch.dtype) -> None:
    """Dequantise every weight of a model, unless an adapter that is merged has done so.

    Raises:
        ValueError: there is none that is quantised, or the dtype is none of floating point.
    """
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype {dtype!r} is none of floating point, such as torch.bfloat16")
    if roster.dequantised is not None:
        return
    if not (found := list(quantised_in(roster.model))):
        raise ValueError(f"merge(dtype={dtype}): no weight of the model is quantised; leave dtype out")
    roster.dequantised = done = Dequantised()
    records = adapted()
    for _, module, parameter in found:  # what interrupts this is taken back by quantise_again
        site = records.get(id(stored(module, parameter)))
        record = None if site is None else site.weight
        new = plain(form_of(module, parameter), dtype)
        before = change_form(module, parameter, new)
        done.layers.append((module, parameter, before, record))
        if record is not None:
            record.quantised = before
    for owner, names in ((roster.model, MARKS), (getattr(roster.model, "config", roster.model), (CONFIG,))):
        done.marks += [(owner, name, vars(owner).pop(name)) for name in names if name in vars(owner)]


def quantise_again(roster: Roster[Any]) -> None:
    """Put the quantised weights back, if nothing is merged into any of them."""
    done = roster.dequantised
    if done is not None and not any(record is not None and record.overwritten for *_, record in done.layers):
        done.undo()
        roster.dequantised = None


def stay_plain(roster: Roster[Any]) -> None:
    """Let the weights be plain for good."""
    if roster.dequantised is not None:
        for *_, record in roster.dequantised.layers:
            if record is not None:
                record.quantised = None
        roster.dequantised = None
