"""Attention head by head: a projection shown as one matrix per head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svdpeft.decomposition import Product
from svdpeft.layers.base import CalledKind, Example, LayerKind
from svdpeft.layers.fused import Part


class Heads(CalledKind):
    """The matrices of a linear kind, one per head.

    Args:
        whole: the kind of the layer, or a part of it.
        heads: number of heads.
        axis: ``"rows"``: (H·d, n) is (H, d, n), a query; ``"columns"``: (m, H·d) is (H, m, d), an output projection.
    """

    def __init__(self, whole: LayerKind, heads: int, axis: Literal["rows", "columns"]) -> None:
        self.whole, self.heads, self.axis = whole, heads, axis
        self.name = f"{whole.name} heads"  # type: ignore[misc]
        self.multiplies = False  # type: ignore[misc]

    def called(self, module: nn.Module) -> bool:
        return self.whole.called(module)

    def to_matrix(self, module: nn.Module, w: Tensor) -> Tensor:
        w = self.whole.to_matrix(module, w)
        if self.axis == "rows":
            return w.unflatten(-2, (self.heads, -1))
        return w.unflatten(-1, (self.heads, -1)).movedim(-2, -3)

    def from_matrix(self, module: nn.Module, matrix: Tensor) -> Tensor:
        whole = matrix.flatten(-3, -2) if self.axis == "rows" else matrix.movedim(-3, -2).flatten(-2)
        return self.whole.from_matrix(module, whole)

    def apply(self, module: nn.Module, x: Tensor, product: Product) -> Tensor:
        left, core, right = product.L, product.C, product.A  # (H, m, r), (H, r) or (H, r, r), (H, r, n)
        if self.axis == "rows":
            z = F.linear(x, right.flatten(0, 1)).unflatten(-1, (self.heads, -1))  # (..., H, r)
        else:
            z = torch.einsum("...hn,hrn->...hr", x.unflatten(-1, (self.heads, -1)), right)
        if core is not None:
            z = z * core if core.ndim == 2 else torch.einsum("...hs,hrs->...hr", z, core)
        if self.axis == "columns":
            return F.linear(z.flatten(-2), left.movedim(0, 1).flatten(1)) * product.scale
        out = torch.einsum("...hr,hmr->...hm", z, left).flatten(-2) * product.scale
        return self.whole.spread(out) if isinstance(self.whole, Part) else out

    def run(self, module: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        return self._layer.run(module, x, w)

    def add_bias(self, module: nn.Module, out: Tensor) -> Tensor:
        return self._layer.add_bias(module, out)

    @property
    def _layer(self) -> CalledKind:
        assert isinstance(self.whole, CalledKind), "only a layer that is called has an output to add to"
        return self.whole

    def examples(self) -> list[Example]:
        return []  # of the kinds that it is a view of
