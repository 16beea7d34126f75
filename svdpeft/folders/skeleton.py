"""A model without its weights, built from its folder, and where in the folder each of them is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdpeft.folders.folder import WORDS, Folder
from svdpeft.sites.weights import BaseWeight, stored


class Filed(BaseWeight):
    """The record of a weight that stays on the disk: it is read when it is asked for, and not kept.

    Args:
        owner: module that has its place.
        parameter: its name there.
        read: gives the weight.
    """

    def __init__(self, owner: nn.Module, parameter: str, read: Callable[[], Tensor]) -> None:
        self._read = read
        super().__init__(owner, parameter)

    @property
    def stored(self) -> Tensor:
        """The weight, read now."""
        return self._read()

    @property
    def original(self) -> Tensor:
        """The same: nothing is written into it here."""
        return self._read()


class Skeleton:
    """A model on the meta device, whose weights are in a folder.

    Args:
        folder: of the model.

    Raises:
        ValueError: neither transformers nor timm has a class for it.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            self.model: nn.Module = _timm(folder.path) if folder.of_timm else _transformers(folder)

    def tensors(self) -> dict[str, Tensor]:
        """The model's parameters and buffers, without values; a tied one by all its names."""
        parameters = self.model.named_parameters(remove_duplicate=False)
        return {**dict(parameters), **dict(self.model.named_buffers(remove_duplicate=False))}

    def filed_as(self, tensor: Tensor) -> str:
        """The name of one of the model's tensors in the folder.

        Raises:
            ValueError: it is not there, or not as the model has it.
        """
        names = [name for name, other in self.tensors().items() if other is tensor]
        found = next((name for name in names if name in self.folder.entries), None)
        if found is None:
            raise self._refusal(f"no tensor {names[0]}, or has it under another name than the model")
        entry = self.folder.entries[found]
        if entry.dtype not in WORDS.values() and tensor.is_floating_point():
            raise self._refusal(f"{found} as {entry.dtype}, which is quantised")
        if entry.shape != tuple(tensor.shape) and not self._grew(entry.shape, tensor):
            raise self._refusal(f"{found} of shape {list(entry.shape)}, the model of {list(tensor.shape)}")
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the folder, with the rows that its model has got for new tokens."""
        entry, wanted = self.folder.entries[name], self._tensor(name)
        return tuple(wanted.shape) if wanted is not None and self._grew(entry.shape, wanted) else entry.shape

    @property
    def grown(self) -> bool:
        """Whether the model has more tokens than the folder."""
        return any(self.shape(name) != entry.shape for name, entry in self.folder.entries.items())

    def read(self, name: str) -> Tensor:
        """A tensor of the folder; a new row is the mean of the others, as where a model grows in memory."""
        here, shape = self.folder.tensor(name), self.shape(name)
        if here.shape == shape:
            return here
        grown = here.new_zeros(shape)
        grown[: len(here)] = here
        grown[len(here) :] = here.float().mean(0)
        return grown

    def record(self, owner: nn.Module, parameter: str) -> Filed:
        """The record of a weight."""
        name = self.filed_as(stored(owner, parameter))
        return Filed(owner, parameter, lambda: self.read(name))

    def _tensor(self, name: str) -> Tensor | None:
        """The model's own of that name, where it has one."""
        owner, _, leaf = name.rpartition(".")
        try:
            module = self.model.get_submodule(owner)
        except AttributeError:
            return None
        return {**module._parameters, **module._buffers}.get(leaf)

    def _grew(self, shape: tuple[int, ...], wanted: Tensor) -> bool:
        """Whether a tensor has more rows in the model than in the folder, as those do that have a row per token."""
        ends = [getattr(self.model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
        mine = [tensor for end in ends if isinstance(end, nn.Module) for tensor in end._parameters.values()]
        return any(tensor is wanted for tensor in mine) and shape[1:] == wanted.shape[1:] and shape[0] < len(wanted)

    def _refusal(self, what: str) -> ValueError:
        return ValueError(
            f"{self.folder.path} has {what}: a folder is changed only where it has the tensors as the model has them. "
            "Load the model, svdpeft.load() the adapter, adapter.merge(permanent=True) and save the model"
        )


def _timm(path: Path) -> nn.Module:
    import timm

    return timm.create_model(f"local-dir:{path}", pretrained=False)


def _transformers(folder: Folder) -> Any:
    import transformers

    name = next(iter(folder.config.get("architectures") or ()), None)
    cls = getattr(transformers, name or "", None)
    if cls is None:
        what = f"of class {name}, which transformers does not have" if name else "of no class: no 'architectures'"
        raise ValueError(f"{folder.path / 'config.json'} is {what}")
    return cls._from_config(cls.config_class.from_pretrained(folder.path))
