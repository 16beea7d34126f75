"""GPT-2's ``Conv1D`` of transformers: a linear layer whose weight is stored (in, out)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from svdpeft.layers.base import Example
from svdpeft.layers.linear import Linear
from svdpeft.registry import KINDS


@KINDS.register("hf-conv1d")
class HFConv1D(Linear):
    """y = x W + bias: the matrix is the transposed weight."""

    classes: ClassVar = ("transformers.pytorch_utils.Conv1D",)

    def to_matrix(self, module: nn.Module, w: Tensor) -> Tensor:
        return w.mT

    def from_matrix(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.mT

    def run(self, module: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    def examples(self) -> list[Example]:
        from transformers.pytorch_utils import Conv1D

        layer = Conv1D(7, 4).double()
        nn.init.normal_(layer.bias)  # zero at construction
        nn.init.normal_(layer.weight)
        return [Example(layer, torch.randn(2, 3, 4).double())]
