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
        leaves: no functions of the parameters.
        gradients: with those of the parameters.
    """

    def __init__(self, parameters: Mapping[str, Tensor], leaves: bool, gradients: bool) -> None:
        self.parameters, self.leaves, self.gradients = parameters, leaves, gradients
        self.whole: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.whole:
            parameter = self.parameters[name]
            if self.leaves:
                self.whole[name] = gathered(parameter).detach().requires_grad_(parameter.requires_grad)
                if self.gradients and parameter.grad is not None:
                    self.whole[name].grad = gathered(parameter.grad)
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


def assembled(sites: Sequence[Factors]) -> list[Factors]:
    """The same sites with whole tensors, in which what is computed from them is differentiable."""
    return _wholes(sites, leaves=False, gradients=False)


@contextmanager
def in_place(sites: Sequence[Factors], gradients: bool) -> Iterator[list[Factors]]:
    """Within the block the same sites with whole tensors; afterwards the shards are what became of them.

    Args:
        sites: of a method.
        gradients: whether it looks at gradients, or changes them.
    """
    wholes = _wholes(sites, leaves=True, gradients=gradients)
    yield wholes
    for f in wholes:
        if isinstance(gathering := vars(f)["_parameters"], _Gathering):
            gathering.write_back()


def _wholes(sites: Sequence[Factors], leaves: bool, gradients: bool) -> list[Factors]:
    seen = [copy.copy(f) if any(map(sharded, f._parameters.values())) else f for f in sites]  # with the same memory
    for f, site in zip(seen, sites, strict=True):
        if f is not site:
            vars(f)["_parameters"] = _Gathering(dict(site.named_parameters()), leaves, gradients)
    return seen
