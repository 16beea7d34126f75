"""Bilinear layers, y_o = x₁ᵀ W_o x₂: one matrix per output.

stored (out, in1, in2) = a batch of ``out`` matrices
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from svdpeft.layers.base import Example, LayerKind
from svdpeft.registry import KINDS


@KINDS.register("bilinear")
class Bilinear(LayerKind):
    """Two inputs, so the update is added where the weight is read."""

    classes: ClassVar = ("torch.nn.modules.linear.Bilinear",)

    def to_matrix(self, module: nn.Module, w: Tensor) -> Tensor:
        return w

    def from_matrix(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix

    def per_example(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Sequence[str]:
        return tuple(tensors)

    def examples(self) -> list[Example]:
        return [Example(Pair(), torch.randn(2, 6, 7).double(), ("score",))]


class Pair(nn.Module):
    """Both inputs in one tensor: an example."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Bilinear(4, 3, 5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x[..., :4], x[..., 4:])
