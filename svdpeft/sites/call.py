"""A layer in its own call, for the methods outside the equation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from svdpeft.decomposition import Product
from svdpeft.layers.base import CalledKind
from svdpeft.sites.place import Place


class LayerCall:
    """``methods.base.Call`` of one place."""

    def __init__(self, place: Place, x: Tensor, like: Tensor, own: Tensor | None) -> None:
        assert isinstance(place.kind, CalledKind)
        self.site, self.module, self.kind = place.site, place.module, place.kind
        self.x, self.like, self.own = x, like, own
        self._w0: Tensor | None = None

    @property
    def w0(self) -> Float[Tensor, "*b m n"]:
        if self._w0 is None:  # no cached_property: a compiler cannot enter its lock
            self._w0 = self.site.base_matrix()
        return self._w0

    def rows(self, values: Float[Tensor, "*b m"]) -> Float[Tensor, "*out"]:
        factor = self.kind.per_row(self.module, self.x, values)
        if factor is None:
            return self._dense(values.unsqueeze(-1) * self.w0)
        base = self._base()
        return factor.to(base.dtype) * base

    def columns(self, values: Float[Tensor, "*b n"]) -> Float[Tensor, "*out"]:
        if self.kind.linear:
            return self.frozen(self.x * values.to(self.x.dtype))
        return self._dense(self.w0 * values.unsqueeze(-2))

    def frozen(self, x: Tensor) -> Tensor:
        return self.kind.run_whole(self.module, x, self._stored())

    def per_row(self, values: Float[Tensor, " m"]) -> Tensor:
        factor = self.kind.per_row(self.module, self.x, values)
        assert factor is not None
        return factor.to(self.like.dtype)

    def outputs(self, x: Tensor | None = None) -> Float[Tensor, "... m"]:
        whole = self._base() if x is None else self.kind.run_whole(self.module, x, self._stored())
        return self.kind.narrow(whole)

    def placed(self, y: Float[Tensor, "... m"]) -> Float[Tensor, "*out"]:
        return self.kind.spread(y)

    def add(self, out: Float[Tensor, "*out"] | None, product: Product, dropout: float = 0.0) -> Float[Tensor, "*out"]:
        x, out = self.x, torch.zeros_like(self.like) if out is None else out
        if dropout and self.module.training and x.is_floating_point():
            x = F.dropout(x, dropout)
        dense, product = self.site.prefers_dense(product), product.to(out.dtype)
        if dense:
            return self.kind.add_matrix(self.module, x, out, product.dense())
        return self.kind.add(self.module, x, out, self.kind.suited(product))

    def _base(self) -> Tensor:
        """W0 x of the layer's whole weight."""
        if self.own is None:
            return self.kind.run_like(self.module, self.x, self._stored(), self.like)
        return self.own - self.kind.add_bias(self.module, self.own.new_zeros(()))

    def _stored(self) -> Tensor:
        return self.site.weight.original.to(self.like.dtype)

    def _dense(self, matrix: Tensor) -> Tensor:
        w = self.kind.from_matrix(self.module, matrix).to(self.like.dtype)
        return self.kind.run_like(self.module, self.x, w, self.like)
