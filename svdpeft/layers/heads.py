"""Attention head by head: a projection shown as one matrix per head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svdpeft.decomposition import Product
from svdpeft.layers.base import LayerKind
from svdpeft.layers.view import View


class Heads(View):
    """The matrices of a linear kind, one per head.

    Args:
        whole: the kind of the layer, or a part of it.
        heads: number of heads.
        axis: ``"rows"``: (H·d, n) is (H, d, n), a query; ``"columns"``: (m, H·d) is (H, m, d), an output projection.
    """

    word = "heads"

    def __init__(self, whole: LayerKind, heads: int, axis: Literal["rows", "columns"]) -> None:
        super().__init__(whole)
        self.heads, self.axis = heads, axis
        self.name = f"{whole.name} heads"

    def fields(self) -> dict[str, Any]:
        return {"count": self.heads, "axis": self.axis}

    @classmethod
    def of(cls, whole: LayerKind, fields: Mapping[str, Any]) -> Heads:
        return cls(whole, fields["count"], fields["axis"])

    def to_matrix(self, module: nn.Module, w: Tensor) -> Tensor:
        w = self.whole.to_matrix(module, w)
        if self.axis == "rows":
            return w.unflatten(-2, (self.heads, -1))
        return w.unflatten(-1, (self.heads, -1)).movedim(-2, -3)

    def from_matrix(self, module: nn.Module, matrix: Tensor) -> Tensor:
        whole = matrix.flatten(-3, -2) if self.axis == "rows" else matrix.movedim(-3, -2).flatten(-2)
        return self.whole.from_matrix(module, whole)

    def apply(self, module: nn.Module, x: Tensor, product: Product) -> Tensor:
        left, core, right = product.L, product.tensor_core, product.A  # (H, m, r), (H, r) or (H, r, r), (H, r, n)
        if self.axis == "rows":
            z = F.linear(x, right.flatten(0, 1)).unflatten(-1, (self.heads, -1))  # (..., H, r)
        else:
            z = torch.einsum("...hn,hrn->...hr", x.unflatten(-1, (self.heads, -1)), right)
        if core is not None:
            z = z * core if core.ndim == 2 else torch.einsum("...hs,hrs->...hr", z, core)
        if self.axis == "columns":
            return F.linear(z.flatten(-2), left.movedim(0, 1).flatten(1)) * product.scale
        out = torch.einsum("...hr,hmr->...hm", z, left).flatten(-2) * product.scale
        return self._layer.spread(out)
