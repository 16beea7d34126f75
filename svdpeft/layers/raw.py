"""A raw parameter that no layer kind knows, adapted when it is named.

``targets=["decoder.w"]`` takes the last two axes as (out, in); ``"decoder.w[in,out]"`` says which axis is which, and
every axis with another name is a batch of matrices: ``"spectral[in,out,mode]"`` has one SVD per mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svdpeft.layers.base import Example, LayerKind
from svdpeft.registry import KINDS


@KINDS.register("raw")
class Raw(LayerKind):
    """Matrices along two named axes of a parameter.

    Args:
        axes: one name per axis of the parameter, ``"in"`` and ``"out"`` among them; empty for (…, out, in).
    """

    def __init__(self, axes: tuple[str, ...] = ()) -> None:
        self.axes = tuple(axes)

    @classmethod
    def match(cls, module: nn.Module, parameter: str) -> int | None:
        return None  # never of itself: whether a parameter is a matrix is for the user to say

    @classmethod
    def fits(cls, module: nn.Module, parameter: str) -> bool:
        return True

    def check_axes(self, w: Tensor, name: str) -> None:
        """Raise ``ValueError`` where the axes do not fit the parameter."""
        if self.axes and (len(self.axes) != w.ndim or len(set(self.axes)) != w.ndim):
            raise ValueError(
                f"{name} has {w.ndim} axes, {list(w.shape)}: [{','.join(self.axes)}] must give each of them a name of "
                "its own"
            )

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.name, "axes": list(self.axes)}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Raw:
        return cls(tuple(entry["axes"]))

    def to_matrix(self, module: nn.Module, w: Tensor) -> Tensor:
        return w.permute(self._order()) if self.axes else w

    def from_matrix(self, module: nn.Module, matrix: Tensor) -> Tensor:
        if not self.axes:
            return matrix
        order = self._order()
        return matrix.permute([order.index(axis) for axis in range(len(order))])

    def _order(self) -> list[int]:
        """Batch axes in their own order, then out, then in."""
        matrix = [self.axes.index("out"), self.axes.index("in")]
        return [axis for axis in range(len(self.axes)) if axis not in matrix] + matrix

    def examples(self) -> list[Example]:
        return [
            Example(Spectral(3, 5, 2), torch.randn(2, 3, 2).double(), ("weight[in,out,mode]",)),
            Example(Plain(5, 4), torch.randn(3, 4).double(), ("w",)),
        ]


class Spectral(nn.Module):
    """One matrix per mode, as in a Fourier neural operator: an example."""

    def __init__(self, inner: int, out: int, modes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inner, out, modes, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bim,iom->bmo", x, self.weight)


class Plain(nn.Module):
    """A matrix without a layer: an example."""

    def __init__(self, out: int, inner: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(out, inner, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.mT
