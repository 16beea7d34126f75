"""Full fine-tuning: train every parameter of the base.

W' = W0 + ΔW        ΔW any matrix, for every weight, bias and norm
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
    """Train every parameter of the base. An untouched copy of each is kept, so that it can be given back.

    When to use:
        As the ceiling of a comparison, and where memory and the number of tasks allow a whole model per task. Its own
        learning rate is a tenth of LoRA's for vision, and a fiftieth for language.
    """

    learning_rates: ClassVar = {"vision": 1e-3, "language": 2e-5}
    factored: ClassVar[bool] = False
    latex: ClassVar[str] = r"W' = W_0 + \Delta W"

    def whole(self, model: nn.Module) -> tuple[str, ...]:
        return (".*",)
