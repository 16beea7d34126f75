"""The factors of a sharded model as its methods know them: whole, gathered when they are asked for, written back.

A method's own step is of whole matrices, and it is the same in every process: each takes all of it and keeps its part.
What is not sharded is handed on as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from svdpeft.methods.base import Factors
from svdpeft.sites.shards import differentiable, gathered, sharded, write


class _Gathering(MutableMapping[str, Tensor]):
    """Parameters by name, of which each is gathered when it is first asked for.

    Args:
        parameters: of one site.
        leaves: with their gradients, and no functions of the parameters.
    """

    def __init__(self, parameters: Mapping[str, Tensor], leaves: bool) -> None:
        self.parameters, self.leaves = parameters, leaves
        self.whole: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.whole:
            parameter = self.parameters[name]
            if self.leaves:
                self.whole[name] = gathered(parameter).detach().requires_grad_(parameter.requires_grad)
                self.whole[name].grad = None if parameter.grad is None else gathered(parameter.grad)
            else:
                self.whole[name] = differentiable(parameter)
        return self.whole[name]

    def __contains__(self, name: object) -> bool:
        return name in self.parameters

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.whole[name] = tensor

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name} is a parameter of a site: a method's step changes its values")

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    def write_back(self) -> None:
        """Let the shards be what became of the values and the gradients of what trains."""
        for name, whole in self.whole.items():
            if (parameter := self.parameters[name]).requires_grad:
                write(parameter, whole.detach())
                if whole.grad is not None:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    write(parameter.grad, whole.grad)


def assembled(sites: Sequence[Factors], leaves: bool = False) -> list[Factors]:
    """The same sites with whole tensors.

    Args:
        sites: of a method.
        leaves: with gradients of their own; else what is computed from them is differentiable in the shards.
    """
    return [_whole(f, leaves) if any(map(sharded, f._parameters.values())) else f for f in sites]


@contextmanager
def in_place(sites: Sequence[Factors]) -> Iterator[list[Factors]]:
    """Within the block the same sites with whole tensors; afterwards the shards are what became of them."""
    wholes = assembled(sites, leaves=True)
    yield wholes
    for f in wholes:
        if isinstance(gathering := vars(f)["_parameters"], _Gathering):
            gathering.write_back()


def _whole(f: Factors, leaves: bool) -> Factors:
    seen = copy.copy(f)  # with the same memory
    vars(seen)["_parameters"] = _Gathering(dict(f.named_parameters()), leaves)
    return seen
