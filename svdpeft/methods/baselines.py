"""The baselines that every comparison needs: they train parameters of the base itself and have no factors.

    full         every parameter
    partial      the parameters that are named
    head-only    none of them: only what attach(train=…) names, usually the new head

They are methods like any other, so that a comparison treats all alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from svdpeft.methods.base import Method
from svdpeft.registry import METHODS


@METHODS.register("full")
@dataclass(frozen=True)
class Full(Method):
    """Train every parameter of the base. An untouched copy of each is kept, so that it can be given back."""

    factored: ClassVar[bool] = False

    def whole(self, model: nn.Module) -> tuple[str, ...]:
        return (".*",)


@METHODS.register("partial")
@dataclass(frozen=True)
class Partial(Method):
    """Train the named layers or parameters of the base.

    Args:
        layers: patterns, as ``targets`` takes them, of modules or parameters: ``("blocks.11", "norm")``.
    """

    layers: tuple[str, ...] = ()

    factored: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # a list out of JSON or TOML
        if not self.layers:
            raise ValueError("Partial(layers=…) names no layer to train")

    def whole(self, model: nn.Module) -> tuple[str, ...]:
        return self.layers


@METHODS.register("head-only")
@dataclass(frozen=True)
class HeadOnly(Method):
    """Train nothing of the base but what ``attach(train=…)`` names: the floor of a comparison."""

    factored: ClassVar[bool] = False
