"""Linear probing: nothing of the base trains, only the new head.

W' = W0        for every weight but those that attach(train=…) names
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svdpeft.methods.base import Method
from svdpeft.registry import METHODS


@METHODS.register("head-only")
@dataclass(frozen=True)
class HeadOnly(Method):
    """Train nothing of the base but what ``attach(train=…)`` names: the floor of a comparison.

    When to use:
        To know what the features are worth before anything is adapted. A method that does not beat it does nothing.
    """

    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    factored: ClassVar[bool] = False
    latex: ClassVar[str] = r"W' = W_0"
    example: ClassVar[str] = """\
from torch import nn
import svdpeft

model = nn.Sequential(nn.Linear(256, 320), nn.GELU(), nn.Linear(320, 10))
adapter = svdpeft.attach(model, svdpeft.HeadOnly(), train=["2"])
print(adapter.summary())
"""
