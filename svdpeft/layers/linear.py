"""Linear layers: torch's ``nn.Linear``, weight (out, in)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svdpeft.decomposition import Band, Product
from svdpeft.layers import quantised
from svdpeft.layers.base import CalledKind, Example
from svdpeft.registry import KINDS


@KINDS.register("linear")
class Linear(CalledKind):
    """y = x Wᵀ + bias: the weight is the matrix."""

    classes: ClassVar = (
        "torch.nn.modules.linear.Linear",
        # Subclasses with another way to write the same product.
        "rwkv7_hf.modeling_rwkv7.RWKV7Linear",
        "transformers.models.falcon.modeling_falcon.FalconLinear",
        *quantised.LINEARS,
    )
    linear: bool = True
    sees: bool = True
    bands: bool = True

    def called(self, module: nn.Module) -> bool:
        # Torch's own word for the output projection that nn.MultiheadAttention reads and never calls.
        return super().called(module) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)

    def to_matrix(self, module: nn.Module, w: Tensor) -> Tensor:
        return w

    def from_matrix(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix

    def apply(self, module: nn.Module, x: Tensor, product: Product) -> Tensor:
        out = F.linear(self._down(x, product), product.L)
        return out if product.scale == 1 else out * product.scale

    def run(self, module: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w)

    def per_row(self, module: nn.Module, x: Tensor, values: Tensor) -> Tensor:
        return values

    def add_bias(self, module: nn.Module, out: Tensor) -> Tensor:
        return out if module.bias is None else out + module.bias.to(out.dtype)  # type: ignore[operator]

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return x

    def add(self, module: nn.Module, x: Tensor, out: Tensor, product: Product) -> Tensor:
        # One pass over the output: multiply, scale and add in a single kernel. Autocast gives z another dtype than a
        # quantised layer's own kernel gives the output.
        z = self._down(x, product).to(out.dtype)
        rows = out.view(-1, out.shape[-1])
        if out.requires_grad:
            rows = rows.clone()  # one copy here: the gradient of a view that was changed in place takes three
        rows.addmm_(z.reshape(-1, z.shape[-1]), product.L.mT, alpha=product.scale)
        return rows.view(out.shape)  # not `out`: torch 2.11 takes it for a leaf in a second adapter's in-place addition

    def add_rows(self, module: nn.Module, x: Tensor, out: Tensor, matrix: Tensor, rows: Tensor, total: int) -> Tensor:
        return out.index_add_(-1, rows, F.linear(x, matrix))

    def examples(self) -> list[Example]:
        torch_linear = nn.Linear(7, 5, dtype=torch.float64)
        wide = nn.Linear(6, 11, bias=False, dtype=torch.float64)
        return [Example(torch_linear, torch.randn(2, 3, 7).double()), Example(wide, torch.randn(4, 6).double())]

    @staticmethod
    def _down(x: Tensor, product: Product) -> Tensor:
        """C A x, (..., r)."""
        z = F.linear(x, product.A)
        if product.C is None:
            return z
        if isinstance(product.C, Band):
            return product.C.through(z)
        return z * product.C if product.C.ndim == 1 else F.linear(z, product.C)
