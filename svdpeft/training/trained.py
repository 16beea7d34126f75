"""A training of an adapter trains what ``adapter.parameters()`` gives, all of it and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.roster import adapters_in
from svdpeft.adapter.switching import WAYS
from svdpeft.targets.wrappers import unwrapped


def check_trains(adapter: Adapter, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Refuse a training that would train something else than the adapter, or nothing of it.

    Args:
        adapter: that is to be trained.
        model: that will be called; wrappers of it are seen through.
        optimizer: where somebody has made it already.

    Raises:
        RuntimeError: the adapter is merged, disabled or detached.
        ValueError: the adapter is of another model; another parameter of the model requires a gradient; the optimizer
            has others.
    """
    if adapter.state in WAYS:
        raise RuntimeError(
            f"adapter {adapter.name!r} is {adapter.state}, and nothing of it would train: {WAYS[adapter.state]}"
        )
    if covered := adapter.own.covered():
        name, other = next(iter(covered.items()))
        raise ValueError(
            f"{name} of adapter {adapter.name!r} is covered by that of adapter {other!r}, which was attached later: "
            f"call svdpeft.only(model, {adapter.name!r}), or disable() the other"
        )
    inner = unwrapped(model)
    own = {id(p): name for name, p in adapter.named_parameters()}
    there = {id(p) for p in inner.parameters()}
    if lost := [name for p, name in own.items() if p not in there]:
        raise ValueError(
            f"adapter {adapter.name!r} is not of this model: its {lost[0]} is no parameter of it. Train the model that "
            "it was attached to, or attach (or load) one to this model; a deep copy has an adapter of its own"
        )
    others = [a for a in adapters_in(inner) if a is not adapter]
    of_others = {id(p): f"{n} of adapter {a.name!r}" for a in others for n, p in a.named_parameters()}
    trains = {id(p): name for name, p in inner.named_parameters() if p.requires_grad}
    if extra := [name for p, name in trains.items() if p not in own and p not in of_others]:
        raise ValueError(
            f"{extra[0]} requires a gradient and is not of adapter {adapter.name!r}: it would train, and the adapter's "
            f"file would not have it. Attach with train=[{extra[0]!r}], or set its requires_grad to False"
        )
    if optimizer is None:
        return
    steps = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if extra := [name for p, name in {**trains, **of_others}.items() if p in steps and p not in own]:
        raise ValueError(
            f"the optimizer has parameters beside those of adapter {adapter.name!r}, such as {extra[0]}: it would "
            "train them, and nothing would save them. Make it of adapter.parameters(); of another adapter, set "
            "requires_grad of its parameters to False before the trainer is made"
        )
    if lost := [name for p, name in own.items() if p not in steps]:
        raise ValueError(f"the optimizer does not have {lost[0]}, which adapter {adapter.name!r} trains")


@contextmanager
def alone(adapters: Collection[Adapter], model: nn.Module) -> Iterator[None]:
    """Within the block all other adapters of the model act and do not train."""
    others: list[Any] = [adapter for adapter in adapters_in(unwrapped(model)) if adapter not in adapters]
    resting = [p for other in others for p in other.parameters() if p.requires_grad]
    for parameter in resting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in resting:
            parameter.requires_grad_(True)
