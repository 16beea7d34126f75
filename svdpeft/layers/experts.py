"""Mixtures of experts in transformers: one 3-d parameter holds a matrix per expert.

stored (experts, out, in), or (experts, in, out) where the module says ``is_transposed``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from svdpeft.layers.base import Example, LayerKind, Ranges, dotted
from svdpeft.registry import KINDS

PARAMETERS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
TRANSPOSED = {  # classes that do not say it themselves
    ("transformers.models.llama4.modeling_llama4.Llama4TextExperts", PARAMETERS): True,
    ("transformers.models.jetmoe.modeling_jetmoe.JetMoeParallelExperts", ("weight",)): False,
}


@KINDS.register("experts")
class Experts(LayerKind):
    """One SVD per expert."""

    linear: bool = True

    @classmethod
    def match(cls, module: nn.Module, parameter: str) -> int | None:
        known = parameter in PARAMETERS and _says(module) is not None
        known |= any(dotted(type(module)) == name and parameter in names for name, names in TRANSPOSED)
        return 0 if known and module._parameters[parameter].ndim == 3 else None  # type: ignore[union-attr]

    def parts(self, module: Any, parameter: str) -> dict[str, Ranges]:
        if parameter != "gate_up_proj":
            return {}
        rows = self.to_matrix(module, module._parameters[parameter]).shape[-2]
        if getattr(module, "is_concatenated", True):
            return {"gate": ((0, rows // 2, 1),), "up": ((rows // 2, rows, 1),)}
        return {"gate": ((0, rows, 2),), "up": ((1, rows, 2),)}

    def to_matrix(self, module: nn.Module, w: Tensor) -> Tensor:
        return w.mT if self._transposed(module) else w

    def from_matrix(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.mT if self._transposed(module) else matrix

    def per_example(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Sequence[str] | None:
        # A row for each token, and with it which experts are to see it: others are called expert by expert.
        routed = {"top_k_index", "router_indices"} & tensors.keys() and "hidden_states" in tensors
        return tuple(tensors) if routed and len({len(tensor) for tensor in tensors.values()}) == 1 else None

    def _transposed(self, module: nn.Module) -> bool:
        says = _says(module)
        return says if says is not None else next(t for (n, _), t in TRANSPOSED.items() if dotted(type(module)) == n)

    def examples(self) -> list[Example]:
        x = torch.randn(7, 3, dtype=torch.float64)
        return [Example(Routed(transposed), x, ("down_proj",)) for transposed in (False, True)]


class Routed(nn.Module):
    """Four experts, each token to one of them, in either layout: an example."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.down_proj = nn.Parameter(torch.randn((4, 3, 5) if transposed else (4, 5, 3), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        expert = torch.arange(len(x)) % 4
        return torch.stack([self._one(row, int(e)) for row, e in zip(x, expert, strict=True)])

    def _one(self, row: Tensor, expert: int) -> Tensor:
        w = self.down_proj[expert]
        return row @ w if self.is_transposed else w @ row


def _says(module: nn.Module) -> bool | None:
    """transformers writes the orientation on every experts class that its kernels can run."""
    says = vars(module).get("is_transposed")
    return says if isinstance(says, bool) else None
