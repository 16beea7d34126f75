"""Embeddings: a row of the weight per token.

stored (tokens, width) = the matrix, the same view that a tied output layer has of it
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svdpeft.decomposition import Product
from svdpeft.layers.base import CalledKind, Example
from svdpeft.registry import KINDS


@KINDS.register("embedding")
class Embedding(CalledKind):
    """Rows of L are looked up and multiplied by C A: no gradient of the size of the vocabulary but L's own."""

    classes: ClassVar = ("torch.nn.modules.sparse.Embedding",)
    multiplies: bool = False

    @classmethod
    def match(cls, module: Any, parameter: str) -> int | None:
        found = super().match(module, parameter)
        # With max_norm the forward pass itself rewrites the base weight.
        return None if found is None or module.max_norm is not None else found

    def called(self, module: nn.Module) -> bool:
        return super().called(module) or _scaled(module)

    def to_matrix(self, module: nn.Module, w: Tensor) -> Tensor:
        return w

    def from_matrix(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix

    def apply(self, module: Any, x: Tensor, product: Product) -> Tensor:
        z = self.run(module, x, product.L)
        if (core := product.tensor_core) is not None:
            z = z * core if core.ndim == 1 else z @ core
        return z @ product.A * product.scale

    def run(self, module: Any, x: Tensor, w: Tensor) -> Tensor:
        return F.embedding(x, w, module.padding_idx) * _scale(module)  # the row of padding gets no gradient

    def add_rows(self, module: nn.Module, x: Tensor, out: Tensor, matrix: Tensor, rows: Tensor, total: int) -> Tensor:
        at = torch.searchsorted(rows, x.contiguous()).clamp(
            max=len(rows) - 1
        )  # of each token that has a row, where it is
        mine = (rows[at] == x).unsqueeze(-1)
        return out.add_(F.embedding(at, matrix) * mine * _scale(module))

    def per_row(self, module: nn.Module, x: Tensor, values: Tensor) -> Tensor:
        return self.run(module, x, values.unsqueeze(-1))

    def add_bias(self, module: nn.Module, out: Tensor) -> Tensor:
        return out

    def examples(self) -> list[Example]:
        return [Example(nn.Embedding(11, 5).double(), torch.tensor([[1, 3, 10, 0], [2, 4, 5, 9]]))]


def _scaled(module: nn.Module) -> bool:
    """Whether it is one of transformers' embeddings whose forward is torch's, times a scale."""
    return type(module).__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale")


def _scale(module: Any) -> Any:
    if not _scaled(module):
        return 1.0
    scale = module.embed_scale
    return scale.to(module._parameters["weight"].dtype) if isinstance(scale, Tensor) else scale
