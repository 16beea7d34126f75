"""What training changes of the base itself: whole parameters and the statistics of normalisation layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svdpeft.sites.weights import stored


class Borrowed:
    """Tensors of the base that training changes whole, with the values to give back.

    Parameters that ``train=`` names, and the running statistics of normalisation layers.

    Args:
        model: that they are in.
        places: name -> (owner, attribute); owners rather than tensors, so that a moved model is still found.
    """

    def __init__(self, model: nn.Module, places: dict[str, tuple[nn.Module, str]]) -> None:
        self.model = model
        self.places: dict[str, tuple[nn.Module, str]] = {}
        self._away: dict[str, Tensor] = {}  # whichever tensor is not in the model now
        self.add(places)

    def add(self, places: Mapping[str, tuple[nn.Module, str]]) -> None:
        """Borrow more; what these tensors hold now is what will be given back."""
        self.places |= places
        self._away |= {name: self[name].clone() for name in places}

    def __getitem__(self, name: str) -> Tensor:
        return stored(*self.places[name]).detach()

    def swap(self) -> None:
        """Exchange the model's tensors and the kept ones: once gives the base, twice again what is trained.

        The tensors themselves, and not their values: a forward of before may still need what it has seen of them for
        its ``backward``.
        """
        names = {id(stored(*place)): name for name, place in self.places.items()}
        kept: dict[str, Tensor] = {}
        for module in self.model.modules():  # a shared parameter has several places
            for tensors in (module._parameters, module._buffers):
                for attribute, here in tensors.items():
                    if here is not None and (name := names.get(id(here))) is not None:
                        kept[name] = here
                        tensors[attribute] = self._like(name, here)
        self._away = kept

    def _like(self, name: str, here: Tensor) -> Any:
        """What is kept of a tensor, as the one in the model is: that one may have moved in the meantime."""
        away = self._away[name]
        if isinstance(here, nn.Parameter) and not isinstance(away, nn.Parameter):
            away = nn.Parameter(away, requires_grad=False)
        if (away.device, away.dtype) != (here.device, here.dtype):
            away.data = away.data.to(here.device, here.dtype)
        self._away[name] = away
        return away

    @torch.no_grad()
    def give_back(self) -> None:
        """Write the base's values into the model's own tensors."""
        for name in self._away:
            self.reset(name)

    @torch.no_grad()
    def reset(self, name: str) -> None:
        """Write the base's value of one of them into the model's own tensor."""
        self[name].copy_(self._away[name])

    def changed(self) -> dict[str, Tensor]:
        """The tensors that differ from what they were."""
        return {
            name: self[name] for name, away in self._away.items() if not torch.equal(self[name], away.to(self[name]))
        }


class Frozen:
    """Normalisation layers held in evaluation mode, whatever mode their model is put into.

    Args:
        model: all its layers with running statistics; several adapters may hold them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if _has_statistics(module)]
        self.hold()

    def hold(self) -> None:
        """Put them into evaluation mode and keep them there."""
        for layer in self.layers:
            held = vars(layer).setdefault("train", _Held(layer))
            held.holders += 1
            layer.training = False

    def release(self) -> None:
        """Give them the mode that was last asked for, unless another adapter holds them too."""
        for layer in self.layers:
            held = vars(layer)["train"]
            held.holders -= 1
            if not held.holders:
                del layer.train
                layer.train(held.mode)


class _Held:
    """Stands in the place of a layer's ``train``; a class and no closure, so that the model can be pickled."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.mode, self.holders = layer, layer.training, 0

    def __call__(self, mode: bool = True) -> nn.Module:
        self.mode = mode
        return self.layer


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) and bool(module.track_running_stats)


def running_statistics(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Places of the statistics that a forward pass in training mode changes."""
    return {
        f"{name}.{attribute}".lstrip("."): (module, attribute)
        for name, module in model.named_modules()
        if _has_statistics(module)
        for attribute, value in module._buffers.items()
        if value is not None
    }
