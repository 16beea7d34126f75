"""``nn.MultiheadAttention``: query, key and value in one parameter, each a matrix of its own.

stored in_proj_weight (3·E, E) = q, k, v (E, E); with other widths of key and value three parameters
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from svdpeft.layers.base import Example, LayerKind, Ranges
from svdpeft.registry import KINDS

PARAMETERS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@KINDS.register("attention")
class Attention(LayerKind):
    """The weights of the input projections; ``out_proj`` is a linear layer that the attention reads and never calls."""

    classes: ClassVar = ("torch.nn.modules.activation.MultiheadAttention",)
    linear: bool = True
    split: bool = True

    @classmethod
    def match(cls, module: nn.Module, parameter: str) -> int | None:
        return super().match(module, cls.parameter) if parameter in PARAMETERS else None

    def parts(self, module: nn.Module, parameter: str) -> dict[str, Ranges]:
        if parameter != "in_proj_weight":
            return {}
        width: int = module.embed_dim  # type: ignore[assignment]
        return {part: ((i * width, (i + 1) * width, 1),) for i, part in enumerate("qkv")}

    def to_matrix(self, module: nn.Module, w: Tensor) -> Tensor:
        return w

    def from_matrix(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix

    def per_example(self, module: Any, tensors: Mapping[str, Tensor]) -> Sequence[str] | None:
        mask = tensors.get("attn_mask")
        if not module.batch_first or tensors["query"].ndim != 3 or (mask is not None and mask.ndim == 3):
            return None  # time first, no batch, or a mask for every head of every example
        return [name for name in tensors if name != "attn_mask"]

    def examples(self) -> list[Example]:
        x = torch.randn(2, 4, 6, dtype=torch.float64)
        return [
            Example(SelfAttention(6), x, ("attention.in_proj_weight", "attention.out_proj")),
            Example(SelfAttention(5), x, ("attention.k_proj_weight", "attention.v_proj_weight")),
        ]


class SelfAttention(nn.Module):
    """Attention to a memory of another width: an example."""

    def __init__(self, memory: int) -> None:
        super().__init__()
        self.memory = nn.Linear(6, memory, dtype=torch.float64)
        self.attention = nn.MultiheadAttention(6, 2, kdim=memory, vdim=memory, batch_first=True, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.memory(x)
        return self.attention(x, memory, memory, need_weights=False)[0]
