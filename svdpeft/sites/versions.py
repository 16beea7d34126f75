"""Tensors of the base that adapters change whole: each has a version of its own, and one of them is in the model.

Parameters that ``train=`` names, and the running statistics of normalisation layers. The version in the model is that
of the adapter attached last, of those that are on; the base's where none of them is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svdpeft.sites.weights import stored

Where = tuple[nn.Module, str]  # the owner of a tensor rather than the tensor, so that a moved model is still found
BASE = None  # the holder of the base's own version


class Slot:
    """The versions of one tensor.

    Args:
        place: its owner and its name there.
        first: the adapter that trains the very tensor that the model came with; the base's version is a copy.
    """

    def __init__(self, place: Where, first: str) -> None:
        here = stored(*place)
        self.place = place
        self.first: str | None = first
        self.versions: dict[str | None, Tensor] = {BASE: here.detach().clone(), first: here}
        self.shown: str | None = first  # whose version is in the model

    def __getitem__(self, holder: str | None) -> Tensor:
        return stored(*self.place) if holder == self.shown else self.versions[holder]

    def look(self) -> Tensor:
        """Return the tensor in the model, and note it: a buffer that has moved is another one."""
        here = stored(*self.place)
        if self.shown in self.versions:
            self.versions[self.shown] = here
        return here

    def like(self, holder: str | None, here: Tensor) -> Tensor:
        """A version as the one in the model is: that one may have moved in the meantime."""
        away = self.versions[holder]
        if isinstance(here, nn.Parameter) and not isinstance(away, nn.Parameter):
            away = nn.Parameter(away, requires_grad=False)
        if (away.device, away.dtype) != (here.device, here.dtype):
            away.data = away.data.to(here.device, here.dtype)
            away.grad = None if away.grad is None else away.grad.to(here.device, here.dtype)
        if holder is BASE and isinstance(away, nn.Parameter):
            away.requires_grad_(False)
        self.versions[holder] = away
        return away


class Versions:
    """The slots of one model, by the names of their tensors.

    Args:
        model: that they are in.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.slots: dict[str, Slot] = {}
        self.off: set[str] = set()  # adapters whose versions are not to be seen

    def enter(self, adapter: str, places: Mapping[str, Where]) -> None:
        """Give an adapter versions of its own, which start as what the model holds, and put them into the model."""
        for name, place in places.items():
            if (slot := self.slots.get(name)) is None:
                self.slots[name] = Slot(place, adapter)
            else:
                slot.versions[adapter] = slot.look().detach().clone()
        self._show(places)

    def turn(self, adapter: str, on: bool) -> None:
        """Let the versions of an adapter be seen, or not."""
        self.off.discard(adapter) if on else self.off.add(adapter)
        self._show(self.slots)

    @torch.no_grad()
    def leave(self, adapter: str, restore: bool) -> None:
        """Take the versions of an adapter away, or make them the base's.

        Args:
            adapter: its name.
            restore: the base's values stay what they were, and the tensor that the model came with holds them again.
        """
        left = {name: slot for name, slot in self.slots.items() if adapter in slot.versions}
        for slot in left.values():
            slot.look()
            own = slot.versions.pop(adapter)
            if restore and slot.first == adapter:
                own.copy_(slot.versions[BASE])
            if slot.first == adapter:
                slot.versions[BASE], slot.first = own, None
            elif not restore and slot.first is None:  # the base's is the tensor that the model came with
                slot.versions[BASE].copy_(own)
            elif not restore:
                slot.versions[BASE] = own
        self._show(left)
        self.off.discard(adapter)
        self.slots = {name: slot for name, slot in self.slots.items() if len(slot.versions) > 1}

    def _show(self, names: Iterable[str]) -> None:
        """Put the versions that are to be seen into the model: the tensors themselves and not their values, since a
        forward of before may still need what it has seen of them for its ``backward``."""
        exchanged: dict[int, Tensor] = {}
        for slot in map(self.slots.__getitem__, names):
            here = slot.look()
            top = next(holder for holder in reversed(slot.versions) if holder not in self.off)
            if top != slot.shown:
                exchanged[id(here)] = slot.like(top, here)
                slot.shown = top
        for module in self.model.modules() if exchanged else ():  # a shared parameter has several places
            tensors: dict[str, Any]
            for tensors in (module._parameters, module._buffers):
                for attribute, here in tensors.items():
                    if (new := exchanged.get(id(here))) is not None:
                        tensors[attribute] = new
                        if isinstance(module, nn.RNNBase):  # it has a list of its own
                            setattr(module, attribute, new)


class Own:
    """The versions of one adapter.

    Args:
        versions: of the model.
        adapter: its name.
        whole: places of the parameters that it trains whole.
        statistics: places of the running statistics.
    """

    def __init__(
        self, versions: Versions, adapter: str, whole: Mapping[str, Where], statistics: Mapping[str, Where]
    ) -> None:
        self.adapter, self.places = adapter, {**whole, **statistics}
        self._versions = versions
        versions.enter(adapter, self.places)
        self.statistics = tuple(statistics)

    def __getitem__(self, name: str) -> Tensor:
        return self._versions.slots[name][self.adapter]

    def base(self, name: str) -> Tensor:
        """The base's version."""
        return self._versions.slots[name][BASE]

    def version(self, name: str) -> Tensor | None:
        """Its version of a tensor, or the base's where it has none; ``None``: no adapter has one."""
        slot = self._versions.slots.get(name)
        return None if slot is None else slot[self.adapter if name in self.places else BASE]

    def covered(self) -> dict[str, str]:
        """What of it is not in the model: name -> the adapter whose version is."""
        slots = {name: self._versions.slots[name] for name in self.places}
        return {name: str(slot.shown) for name, slot in slots.items() if slot.shown not in (self.adapter, BASE)}

    def turn(self, on: bool) -> None:
        """Put its versions into the model, unless those of a later adapter cover them, or take them out."""
        self._versions.turn(self.adapter, on)

    def leave(self, restore: bool) -> None:
        """Take its versions away, or make them the base's."""
        self._versions.leave(self.adapter, restore)

    def holding(self, values: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Each of its tensors with what it is to hold: a value, or where there is none what the base holds."""
        return [(self[name], values.get(name, self.base(name).detach())) for name in self.places]

    def changed(self) -> dict[str, Tensor]:
        """The statistics that differ from the base's."""
        now = {name: self[name].detach() for name in self.statistics}
        return {name: t for name, t in now.items() if not torch.equal(t, self.base(name).to(t))}
