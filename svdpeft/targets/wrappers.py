"""Wrappers that hold a model and are called in its place: torch.compile's, DataParallel, DistributedDataParallel."""

from __future__ import annotations

from torch import nn

COMPILED = "_orig_mod"  # the name by which torch.compile's module holds its model
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of any number of wrappers, whose parameters have the names that files know.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> unwrapped(torch.compile(nn.DataParallel(model), backend="eager")) is model
        True
    """
    while True:
        if COMPILED in model._modules:
            model = model.get_submodule(COMPILED)
        elif isinstance(model, PARALLEL):
            model = model.module
        else:
            return model
