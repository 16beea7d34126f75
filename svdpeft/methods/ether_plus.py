"""ETHER+: two relaxed reflections, of the outputs and of the inputs of the frozen weight.

    W' = H_o W0 H_i        H = blockdiag(I − û ûᵀ + v̂ v̂ᵀ)        û = u / ‖u‖, v̂ = v / ‖v‖        v = −u at the start

û and v̂ are of one block of the side each. With d = û + v̂ a block is I + d v̂ᵀ − û dᵀ, which is I bit for bit at the
start and keeps all its digits after it. Neither H nor the new weight is built: a layer is given a product of thin
factors.

M. Bini, K. Roth, Z. Akata, A. Khoreva. ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections.
ICML 2024, arXiv:2405.20271.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.decomposition import Product, check_matrix
from svdpeft.methods.base import Factors, Given, Reference, Tensors, ThinTransform, generator
from svdpeft.methods.base.divisors import common
from svdpeft.methods.hra import between, unit
from svdpeft.registry import METHODS


@METHODS.register("ether-plus")
@dataclass(frozen=True)
class ETHERPlus(ThinTransform):
    """One direction of each block leaves and another comes in its place, on both sides of the weight.

    When to use:
        For training that does not mind a high learning rate: ‖H − I‖_F is at most 2 per block, however far the values
        run. It trains 2(m + n) values, whatever the number of blocks, and can be exported as a LoRA of rank 4·blocks.

    Paper and code:
        ETHER without the plus, one reflection I − 2 û ûᵀ, is never the base model, also not at its start: not here.
        With several blocks the published code multiplies each group of rows by one block on all of its columns, which
            is not the block-diagonal product of the paper; here it is.

    Args:
        blocks: on each side; divides m and n, ``clip_rank`` takes the nearest common divisor below.

    Example:
        >>> ETHERPlus().count(1, 4096, 1024)
        10240
    """

    blocks: int = 1

    trains: ClassVar = ("u_in", "v_in", "u_out", "v_out")
    knob: ClassVar[str] = "blocks"
    resolved: ClassVar = ("blocks",)
    draws: ClassVar = True
    learning_rates: ClassVar = {"vision": 3e-3, "language": 1e-3}
    latex: ClassVar[str] = (
        r"W' = H_o W_0 H_i,\quad H = \operatorname{blockdiag}(I - \hat u \hat u^\top + \hat v \hat v^\top)"
    )
    reference: ClassVar = Reference(
        key="bini2024ether",
        authors="Bini, Massimo and Roth, Karsten and Akata, Zeynep and Khoreva, Anna",
        title="ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections",
        year=2024,
        venue="International Conference on Machine Learning",
        arxiv="2405.20271",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks < 1:
            raise ValueError(f"blocks {self.blocks} is below 1")

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()) -> ETHERPlus:
        return dataclasses.replace(self, blocks=common(self.blocks, m, n, site, clip, "blocks", narrowest=2))

    def start(self, w: Tensor, given: Given) -> Tensors:
        check_matrix(w, given.name)  # of zeros a factor makes zeros
        *batch, m, n = w.shape
        drawn = torch.rand(*batch, m + n, generator=generator(given.seed), dtype=torch.float64)
        tensors = {}
        for side, values in zip(("out", "in"), drawn.split([m, n], -1), strict=True):
            blocks = values.unflatten(-1, (self.blocks, -1))  # (*b, blocks, size)
            u = ((2 * blocks - 1) / math.sqrt(blocks.shape[-1])).to(w)
            tensors |= {f"u_{side}": u, f"v_{side}": -u}
        return tensors

    def count(self, batch: int, m: int, n: int) -> int:
        """2 (m + n) per matrix."""
        return batch * 2 * (m + n)

    def export_rank(self, m: int, n: int) -> int:
        return min(4 * self.blocks, m, n)

    def knob_values(self, sites: object) -> list[int]:
        return [self.blocks]  # the count is the same for all

    def thin(self, f: Factors, w0: Tensor) -> Product:
        # H_o W0 H_i − W0 = W0 X_i Y_iᵀ + X_o Y_oᵀ (W0 + W0 X_i Y_iᵀ)
        x_in, y_in = _thin(f.u_in.to(w0.dtype), f.v_in.to(w0.dtype))
        x_out, y_out = _thin(f.u_out.to(w0.dtype), f.v_out.to(w0.dtype))
        turned = w0 @ x_in  # (*b, m, 2 blocks)
        right = y_out.mT @ w0 + (y_out.mT @ turned) @ y_in.mT
        return Product(torch.cat([turned, x_out], -1), None, torch.cat([y_in.mT, right], -2))

    def absolute(self, f: Factors, w0: Tensor) -> Tensor:
        inputs, outputs = (_sizes(f, side, w0.dtype) for side in ("in", "out"))
        return w0.abs() @ inputs + outputs @ (w0.abs() + w0.abs() @ inputs)


def _thin(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """H − I as X Yᵀ, X and Y (*b, size·blocks, 2 blocks), of u and v, (*b, blocks, size)."""
    u, v = u.mT, v.mT  # a column per block
    d, u, v = (_placed(t) for t in (between(-u, v), unit(u), unit(v)))
    return torch.cat([d, -u], -1), torch.cat([v, d], -1)


def _placed(u: Tensor) -> Tensor:
    """(*b, size, blocks) -> (*b, blocks·size, blocks): each block's column, zero outside of its block."""
    return torch.diag_embed(u, dim1=-3, dim2=-1).flatten(-3, -2)


def _sizes(f: Factors, side: str, dtype: torch.dtype) -> Tensor:
    """An upper bound on what the terms of H − I add up to, entry by entry."""
    u, v = (getattr(f, f"{name}_{side}").to(dtype).abs() for name in "uv")
    u, v = (_placed(unit(t.mT)) for t in (u, v))
    return (u + v) @ v.mT + u @ (u + v).mT
