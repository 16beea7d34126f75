"""GOFT: turn the inputs of the frozen weight by log₂ n stages of Givens rotations, n − 1 angles in all.

    W' = W0 S_0 S_1 … S_J        S_j turns inputs i and i + 2ʲ, i = 0, 2·2ʲ, 4·2ʲ, …        θ = π tanh(p), p = 0

On a pair S_j is [[cos θ, −sin θ], [sin θ, cos θ]]; where i + 2ʲ is beyond the last input, input i stays. The stages are
a tree, by which input 0 can be turned into any direction. In the variant "qgoft" each pair has a free 2×2 matrix, I
at the start, whose columns a penalty γ Σ⟨α, β⟩² keeps near orthogonal. A linear layer is given (S_0 … S_J − I) x as
another input: no stage is built as a matrix.

X. Ma, X. Chu, Z. Yang, Y. Lin, X. Gao, J. Zhao. Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation.
ICML 2024, arXiv:2404.04316.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdpeft.decomposition import check_matrix
from svdpeft.methods.base import Call, Factors, Given, Reference, Tensors, Transform
from svdpeft.registry import METHODS

VARIANTS = ("goft", "qgoft")


@METHODS.register("goft")
@dataclass(frozen=True)
class GOFT(Transform):
    """A rotation of all inputs together, at one angle per input.

    When to use:
        To keep singular values, and the angles between the rows of W0, at n − 1 values per layer: fewer than OFT with
        any blocks, and not confined to blocks. Of all rotations it reaches a thin subset. Each forward takes log₂ n
        passes over ever fewer inputs. ``variant="qgoft"`` stretches as well, at four times the values. No LoRA file can
        hold either.

    Paper and code:
        The published code turns neighbouring entries in every stage, whatever the stage's distance, so that its product
        is no rotation from the second stage on; here the stages are those of the paper.
        The code has a factor per input beside the angles, and merges in place; not offered.
        Both are for a number of inputs that is a power of two; here any number has its n − 1 pairs.

    Args:
        variant: ``"goft"``: rotations; ``"qgoft"``: free 2×2 matrices.
        gamma: γ of the penalty of ``"qgoft"``, 1e-2 in the paper and 1e-3 on some tasks.

    Example:
        >>> GOFT().count(1, 1024, 4096), GOFT("qgoft").count(1, 1024, 4096)
        (4095, 16380)
    """

    variant: Literal["goft", "qgoft"] = "goft"
    gamma: float = 1e-2

    knob: ClassVar[str] = "variant"
    smallest: ClassVar = (1, 2)
    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-4}
    latex: ClassVar[str] = r"W' = W_0 \prod_{j} S_j,\quad S_j = \bigoplus_i \mathrm{Rot}(\theta_{ji})"
    reference: ClassVar = Reference(
        key="ma2024goft",
        authors="Ma, Xinyu and Chu, Xu and Yang, Zhibang and Lin, Yang and Gao, Xin and Zhao, Junfeng",
        title="Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation",
        year=2024,
        venue="International Conference on Machine Learning",
        arxiv="2404.04316",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise ValueError(f"variant {self.variant!r} is neither 'goft' nor 'qgoft'")
        if self.gamma < 0:
            raise ValueError(f"gamma {self.gamma} is negative")

    @property
    def trains(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("p",) if self.variant == "goft" else ("S",)

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()) -> GOFT:
        if n < 2:
            raise ValueError(f"{site} has {n} input: there is nothing to turn; leave it out with exclude=")
        return self

    def start(self, w: Tensor, given: Given) -> Tensors:
        check_matrix(w, given.name)  # of zeros a factor makes zeros
        *batch, _, n = w.shape
        if self.variant == "goft":
            return {"p": w.new_zeros(*batch, n - 1)}
        return {"S": torch.eye(2, dtype=w.dtype, device=w.device).repeat(*batch, n - 1, 1, 1)}

    def count(self, batch: int, m: int, n: int) -> int:
        """n − 1 per matrix; four times as many in "qgoft"."""
        return batch * (n - 1) * (1 if self.variant == "goft" else 4)

    def knob_values(self, sites: object) -> tuple[str, ...]:
        return VARIANTS

    def delta(self, f: Factors, w0: Tensor) -> Tensor:
        blocks = self._blocks(f).to(w0.dtype).mT  # rows of W0 are multiplied from the right
        return through(w0, blocks.unsqueeze(-4), list(stages(w0.shape[-1])))

    def absolute(self, f: Factors, w0: Tensor) -> Tensor:
        blocks = self._blocks(f).to(w0.dtype).mT.abs()
        return through(w0.abs(), blocks.unsqueeze(-4), list(stages(w0.shape[-1])))

    def acts(self, linear: bool) -> bool:
        return linear

    def act(self, f: Factors, call: Call) -> Tensor:
        order = list(stages(call.x.shape[-1]))[::-1]
        return call.frozen(through(call.x, self._blocks(f).to(call.x.dtype), order))

    def penalty(self, sites: Sequence[Factors]) -> Tensor | None:
        if self.variant == "goft" or self.gamma == 0:
            return None
        total = torch.zeros((), device=sites[0].S.device)
        for f in sites:
            total = total + f.S.prod(-1).sum(-1).square().sum().to(total.device)
        return self.gamma * total

    def _blocks(self, f: Factors) -> Tensor:
        """Each pair's matrix less I, (*b, n − 1, 2, 2): exactly zero at the start, and with all digits near it."""
        if self.variant == "qgoft":
            wide = f.S.to(torch.promote_types(f.S.dtype, torch.float32))
            return wide - torch.eye(2, dtype=wide.dtype, device=wide.device)
        theta = math.pi * f.p.to(torch.promote_types(f.p.dtype, torch.float32)).tanh()
        along, across = -2 * (theta / 2).sin().square(), theta.sin()
        return torch.stack([along, -across, across, along], -1).unflatten(-1, (2, 2))


def stages(n: int) -> Iterator[tuple[int, slice]]:
    """Yield the distance of every stage's pairs, and which of the n − 1 pairs are its own.

    Example:
        >>> list(stages(6))
        [(1, slice(0, 3, None)), (2, slice(3, 4, None)), (4, slice(4, 5, None))]
    """
    distance, first = 1, 0
    while distance < n:
        count = (n - distance + 2 * distance - 1) // (2 * distance)
        yield distance, slice(first, first + count)
        distance, first = 2 * distance, first + count


def through(x: Tensor, blocks: Tensor, order: Sequence[tuple[int, slice]]) -> Tensor:
    """Return what a product of stages changes of vectors, each stage after the one before it.

    Args:
        x: vectors, (…, n).
        blocks: the matrices less I by which pairs of entries are multiplied from the left, (…, n − 1, 2, 2).
        order: stages as ``stages`` gives them.
    """
    change = torch.zeros_like(x)
    for distance, which in order:
        block, step = blocks[..., which, :, :], 2 * distance
        ends = slice(0, step * block.shape[-3], step), slice(distance, None, step)
        first, second = (x[..., end] + change[..., end] for end in ends)
        for row, end in enumerate(ends):
            change[..., end] += block[..., row, 0] * first + block[..., row, 1] * second
    return change
