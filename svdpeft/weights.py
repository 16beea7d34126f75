"""Reading and writing a base weight: the one place where a parameter of the base changes.

A weight is its original plus what adapters have written into it. The original is kept while anything is written, and
is copied back when nothing is: it is never reached by subtracting, so every bit returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def stored(owner: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer itself; as an attribute an adapted weight is read with its update added."""
    tensor = owner._parameters.get(name)
    tensor = owner._buffers[name] if tensor is None else tensor
    assert tensor is not None
    return tensor


class BaseWeight:
    """One parameter of the base model, and what is written into it at present.

    Args:
        owner: module that holds the parameter.
        parameter: its name there.
    """

    def __init__(self, owner: nn.Module, parameter: str) -> None:
        self.owner = owner
        self.parameter = parameter
        self._original: Tensor | None = None
        self._written: dict[str, Callable[[], Tensor]] = {}

    @property
    def stored(self) -> Tensor:
        """The parameter itself."""
        return stored(self.owner, self.parameter)

    @property
    def tensor(self) -> Tensor:
        """The parameter as it is now, detached (shares memory)."""
        return self.stored.detach()

    @property
    def original(self) -> Tensor:
        """The base's own value, whatever is written at present."""
        if self._original is None:
            return self.tensor
        self._original = self._original.to(self.stored.device)  # the model may have moved since
        return self._original

    def write(self, key: str, part: Callable[[], Tensor]) -> float:
        """Add ``part()``, in the stored layout, to the weight.

        The sum is formed in at least float32 and rounded once.

        Returns:
            The share of the part that rounding lost, ‖W_stored − W_exact‖_F / ‖part‖_F; 0 for a part of zeros.
        """
        if self._original is None:
            self._original = self.tensor.clone()
        before = self._exact()
        self._written[key] = part
        exact = self._exact()
        self.tensor.copy_(exact)
        size = torch.linalg.vector_norm(exact - before)
        lost = torch.linalg.vector_norm(self.tensor.to(exact.dtype) - exact)
        return float(lost / size) if size > 0 else 0.0

    def erase(self, key: str) -> None:
        """Take back what was written under ``key``; the last one to go restores every bit."""
        rest = {other: part for other, part in self._written.items() if other != key}
        self.tensor.copy_(self._exact(rest) if rest else self.original)
        self._written = rest  # after the copy: if that is interrupted, erasing again completes it
        if not rest:
            self._original = None

    def keep(self, key: str) -> None:
        """Make what was written under ``key`` part of the original; what others have written stays theirs."""
        part = self._written.pop(key)
        if self._written:
            exact = self.original.to(torch.promote_types(self.original.dtype, torch.float32))
            self._original = (exact + part().to(exact.dtype)).to(self.original.dtype)
            self.tensor.copy_(self._exact())
        else:
            self._original = None

    @property
    def changed(self) -> bool:
        """Whether anything is written at present."""
        return bool(self._written)

    def written(self, key: str) -> bool:
        """Whether something is written under ``key``."""
        return key in self._written

    def _exact(self, written: Mapping[str, Callable[[], Tensor]] | None = None) -> Tensor:
        total = self.original.to(torch.promote_types(self.original.dtype, torch.float32))
        for part in (self._written if written is None else written).values():
            total = total + part().to(total.dtype)
        return total


@dataclass(frozen=True)
class MergeReport:
    """What rounding took: per site the share ‖W_stored − W_exact‖_F / ‖ΔW‖_F of the update that was lost."""

    lost: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The largest share over all sites."""
        return max(self.lost.values(), default=0.0)

    def __str__(self) -> str:
        if not self.lost:
            return "merged 0 sites"
        where = max(self.lost, key=lambda name: self.lost[name])
        mean = sum(self.lost.values()) / len(self.lost)
        return (
            f"merged {len(self.lost)} sites; rounding to the weights' dtype lost {mean:.2%} of the update on average, "
            f"at most {self.worst:.2%} at {where}"
        )


class Borrowed:
    """Tensors of the base that training changes whole, with the values to give back.

    Parameters that ``train=`` names, and the running statistics of normalisation layers.

    Args:
        places: name -> (owner, attribute); owners rather than tensors, so that a moved model is still found.
    """

    def __init__(self, places: dict[str, tuple[nn.Module, str]]) -> None:
        self.places: dict[str, tuple[nn.Module, str]] = {}
        self._away: dict[str, Tensor] = {}  # whichever value is not in the model now
        self.add(places)

    def add(self, places: Mapping[str, tuple[nn.Module, str]]) -> None:
        """Borrow more; what these tensors hold now is what will be given back."""
        self.places |= places
        self._away |= {name: self[name].clone() for name in places}

    def __getitem__(self, name: str) -> Tensor:
        return stored(*self.places[name]).detach()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's values and the kept ones: once gives the base back, twice the trained values."""
        for name, away in self._away.items():
            here = self[name]
            self._away[name] = here.clone()
            here.copy_(away)

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
