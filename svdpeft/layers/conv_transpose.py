"""Transposed convolutions in one, two and three dimensions; g groups are a batch of g matrices.

stored (in, out/g, *k)        matrices (g, out/g·∏k, in/g)
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from svdpeft.decomposition import Product
from svdpeft.layers.base import CalledKind, Example
from svdpeft.layers.conv import add_channel_bias, pointwise, through_core
from svdpeft.registry import KINDS

TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@KINDS.register("conv-transpose")
class ConvTranspose(CalledKind):
    """A 1×1 convolution down to r channels per group, then a thin transposed one with the layer's own geometry."""

    classes: ClassVar = tuple(f"torch.nn.modules.conv.ConvTranspose{d}d" for d in (1, 2, 3))
    sees: bool = True

    def to_matrix(self, module: Any, w: Tensor) -> Tensor:
        return rearrange(w, "(g inner) out ... -> g (out ...) inner", g=module.groups)

    def from_matrix(self, module: Any, matrix: Tensor) -> Tensor:
        kernel = (-1, module.out_channels // module.groups, *module.kernel_size)
        return rearrange(matrix, "g m inner -> (g inner) m").reshape(kernel)

    def apply(self, module: Any, x: Tensor, product: Product) -> Tensor:
        return self._apply(module, x, product, None)

    def run(self, module: Any, x: Tensor, w: Tensor) -> Tensor:
        return self._run(module, x, w, None)

    def add_bias(self, module: Any, out: Tensor) -> Tensor:
        return add_channel_bias(module, out)

    def inputs(self, module: Any, x: Tensor) -> Tensor:
        batched = x if x.ndim == len(module.kernel_size) + 2 else x.unsqueeze(0)
        return rearrange(batched, "batch (g n) ... -> g batch ... n", g=module.groups)

    # The size of the output is up to the caller (``output_size``): it is taken from the output that is there.

    def add(self, module: Any, x: Tensor, out: Tensor, product: Product) -> Tensor:
        return out.add_(self._apply(module, x, product, out))

    def run_like(self, module: Any, x: Tensor, w: Tensor, out: Tensor) -> Tensor:
        return self._run(module, x, w, out)

    def _apply(self, module: Any, x: Tensor, product: Product, like: Tensor | None) -> Tensor:
        ones = (1,) * len(module.kernel_size)
        z = pointwise(x, product.A, ones)  # (N, g·r, *space)
        z = through_core(z, product.tensor_core, ones)
        return self._run(module, z, self.from_matrix(module, product.L * product.scale), like)

    def _run(self, module: Any, x: Tensor, w: Tensor, like: Tensor | None) -> Tensor:
        dims = len(module.kernel_size)
        size = None if like is None else list(like.shape[-dims:])
        extra = module._output_padding(
            x, size, module.stride, module.padding, module.kernel_size, dims, module.dilation
        )
        return TRANSPOSED[dims](x, w, None, module.stride, module.padding, extra, module.groups, module.dilation)

    def examples(self) -> list[Example]:
        def randn(*size: int) -> Tensor:
            return torch.randn(size, dtype=torch.float64)

        strided = nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=1, output_padding=(1, 0), groups=2)
        return [
            Example(strided.double(), randn(2, 4, 5, 4)),
            Example(nn.ConvTranspose1d(5, 3, 4, stride=2, dilation=2, bias=False).double(), randn(2, 5, 6)),
            Example(nn.ConvTranspose3d(2, 3, (1, 2, 3), stride=2).double(), randn(1, 2, 3, 2, 4)),
        ]
