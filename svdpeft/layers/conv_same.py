"""timm's ``Conv2dSame``: TensorFlow's SAME padding, computed from the size of the input."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from svdpeft.layers.base import Example
from svdpeft.layers.conv import Conv
from svdpeft.registry import KINDS


@KINDS.register("conv-same")
class ConvSame(Conv):
    """A convolution that pads more on the right than on the left where the stride leaves an odd remainder."""

    classes: ClassVar = ("timm.layers.conv2d_same.Conv2dSame",)

    def run(self, module: Any, x: Tensor, w: Tensor) -> Tensor:
        from timm.layers import conv2d_same

        return conv2d_same(x, w, None, module.stride, module.padding, module.dilation, module.groups)

    def examples(self) -> list[Example]:
        from timm.layers import Conv2dSame

        layer = Conv2dSame(4, 6, 3, stride=2, groups=2, dtype=torch.float64)
        return [Example(layer, torch.randn(2, 4, 8, 7).double())]
