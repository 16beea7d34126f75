"""Normalisation layers with running statistics: where these are, and how the layers are held in evaluation mode."""

from __future__ import annotations

from torch import nn


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
