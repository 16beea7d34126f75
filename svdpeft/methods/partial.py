"""Partial fine-tuning: train the layers that are named, whole.

W' = W0 + ΔW        in the named layers; W' = W0 in all others
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from svdpeft.methods.base import Method
from svdpeft.registry import METHODS


@METHODS.register("partial")
@dataclass(frozen=True)
class Partial(Method):
    """Train the named layers or parameters of the base.

    When to use:
        As the baseline that papers call "last k layers", and where it is known which layers must change. It needs no
        factors and no extra time in the forward pass; the file holds the layers whole.

    Args:
        layers: patterns, as ``targets`` takes them, of modules or parameters: ``("blocks.11", "norm")``.
    """

    layers: tuple[str, ...] = ()

    learning_rates: ClassVar = {"vision": 1e-2, "language": 2e-5}
    factored: ClassVar[bool] = False
    latex: ClassVar[str] = r"W' = W_0 + \Delta W \ \mathrm{in\ the\ named\ layers}"
    example: ClassVar[str] = """\
from torch import nn
import svdpeft

model = nn.Sequential(nn.Linear(256, 320), nn.GELU(), nn.Linear(320, 10))
adapter = svdpeft.attach(model, svdpeft.Partial(layers=["2"]))
print(adapter.summary())
"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # a list out of JSON or TOML
        if not self.layers:
            raise ValueError("Partial(layers=…) names no layer to train")

    def whole(self, model: nn.Module) -> tuple[str, ...]:
        return self.layers
