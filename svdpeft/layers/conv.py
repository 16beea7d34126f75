"""Convolutions in one, two and three dimensions; g groups are a batch of g matrices.

stored (out, in/g, *k)        matrices (g, out/g, in/g·∏k)
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from svdpeft.decomposition import Product
from svdpeft.layers.base import CalledKind, Example
from svdpeft.registry import KINDS

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@KINDS.register("conv")
class Conv(CalledKind):
    """A thin convolution with the layer's own stride, padding, dilation and groups, then a 1×1 one per group."""

    classes: ClassVar[tuple[str, ...]] = tuple(f"torch.nn.modules.conv.Conv{d}d" for d in (1, 2, 3))

    sees: bool = True

    def to_matrix(self, module: Any, w: Tensor) -> Tensor:
        return rearrange(w, "(g out) inner ... -> g out (inner ...)", g=module.groups)

    def from_matrix(self, module: Any, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, module.in_channels // module.groups, *module.kernel_size)

    def apply(self, module: Any, x: Tensor, product: Product) -> Tensor:
        ones = (1,) * len(module.kernel_size)
        z = self.run(module, x, self.from_matrix(module, product.A))  # (N, g·r, *space)
        z = through_core(z, product.tensor_core, ones)
        return pointwise(z, product.L * product.scale, ones)

    def run(self, module: Any, x: Tensor, w: Tensor) -> Tensor:
        return module._conv_forward(x, w, None)

    def per_row(self, module: Any, x: Tensor, values: Tensor) -> Tensor:
        return values.reshape(-1, *(1,) * len(module.kernel_size))

    def add_bias(self, module: Any, out: Tensor) -> Tensor:
        return add_channel_bias(module, out)

    def inputs(self, module: Any, x: Tensor) -> Tensor:
        # The layer itself with an identity for its weight gives the patches, whatever its stride, padding or dilation.
        n = module.in_channels // module.groups * math.prod(module.kernel_size)
        eye = torch.eye(n, dtype=x.dtype, device=x.device).expand(module.groups, n, n)
        batched = x if x.ndim == len(module.kernel_size) + 2 else x.unsqueeze(0)
        patches = self.run(module, batched, self.from_matrix(module, eye))  # (N, g·n, *space)
        return rearrange(patches, "batch (g n) ... -> g batch ... n", g=module.groups)

    def examples(self) -> list[Example]:
        def randn(*size: int) -> Tensor:
            return torch.randn(size, dtype=torch.float64)

        return [
            Example(nn.Conv2d(6, 4, (3, 2), stride=2, padding=1, groups=2).double(), randn(3, 6, 9, 8)),
            Example(nn.Conv2d(3, 5, 3, dilation=2, padding=2, padding_mode="reflect").double(), randn(2, 3, 7, 9)),
            Example(nn.Conv2d(4, 4, 3, padding="same", groups=4, bias=False).double(), randn(2, 4, 6, 5)),
            Example(nn.Conv2d(7, 3, 1).double(), randn(2, 7, 3, 4)),
            Example(nn.Conv1d(4, 6, 3, stride=2, padding=1, padding_mode="circular").double(), randn(2, 4, 9)),
            Example(nn.Conv3d(2, 5, (1, 2, 3), padding_mode="replicate", padding=1).double(), randn(1, 2, 3, 4, 5)),
        ]


def through_core(z: Tensor, core: Tensor | None, ones: tuple[int, ...]) -> Tensor:
    """Multiply the r channels of each group by the core: none, a diagonal (g, r) or matrices (g, r, r)."""
    if core is None:
        return z
    return z * core.reshape(-1, *ones) if core.ndim == 2 else pointwise(z, core, ones)


def add_channel_bias(module: Any, out: Tensor) -> Tensor:
    """Add one bias per channel, whatever the number of space axes."""
    ones = (1,) * len(module.kernel_size)
    return out if module.bias is None else out + module.bias.to(out.dtype).reshape(-1, *ones)


def pointwise(z: Tensor, matrices: Tensor, ones: tuple[int, ...]) -> Tensor:
    """A 1×1 convolution: (N, g·q, *space) by (g, p, q) -> (N, g·p, *space)."""
    groups, p, q = matrices.shape
    return CONV[len(ones)](z, matrices.reshape(groups * p, q, *ones), groups=groups)
