"""RoAd: rotate and stretch pairs of a layer's outputs.

    W' = R W0        R = blockdiag(R_1, …, R_⌈m/2⌉)    R_i = [[α cos θ, −α sin θ], [α sin θ, α cos θ]]    θ = 0, α = 1

Variant 1 has one α and θ per pair, variant 2 one per output, a row of R_i, and variant 4 one per entry of R_i. The last
of an odd number of outputs has a zero for its partner, so that it is only stretched. A linear layer's output is changed
entry by entry, without ΔW.

B. Liao, C. Monz. 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability.
NeurIPS 2024, arXiv:2409.00119.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from svdpeft.decomposition import check_matrix
from svdpeft.methods.base import Call, Factors, Given, Reference, Tensors, Transform
from svdpeft.registry import METHODS

VARIANTS = (1, 2, 4)


@METHODS.register("road")
@dataclass(frozen=True)
class RoAd(Transform):
    """Rotations in the planes of two outputs each, as rotary position embeddings have them, with a length of their own.

    When to use:
        For very few values, m per layer, and next to no time per forward on linear layers: a product per entry and two
        sums. It mixes an output only with its neighbour. Other layers build one m×n matrix per forward, and no LoRA
        file can hold the result.

    Paper and code:
        The paper turns a layer's output with its bias. Here, as with every method, the bias is the base's own and
            stays: the two are alike on layers without one.
        The paper pairs outputs 1 and 2, 3 and 4, and so on; PEFT pairs i with i + g/2 in groups of g = 64, so that its
            files are of another adapter unless ``group_size=2``.
        Both need an even number of outputs, PEFT one that g divides; here an odd one is filled up.

    Args:
        variant: 1, 2 or 4, as often as variant 1 has them there are α and θ.

    Example:
        >>> [RoAd(variant).count(1, 1024, 4096) for variant in (1, 2, 4)]
        [1024, 2048, 4096]
    """

    variant: Literal[1, 2, 4] = 1

    trains: ClassVar = ("alpha", "theta")
    knob: ClassVar[str] = "variant"
    learning_rates: ClassVar = {"vision": 3e-3, "language": 3e-3}
    latex: ClassVar[str] = (
        r"W' = R\, W_0,\quad R = \operatorname{blockdiag}(R_i),\quad R_i = \alpha_i \mathrm{Rot}(\theta_i)"
    )
    reference: ClassVar = Reference(
        key="liao2024road",
        authors="Liao, Baohao and Monz, Christof",
        title="3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability",
        year=2024,
        venue="Advances in Neural Information Processing Systems",
        arxiv="2409.00119",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise ValueError(f"variant {self.variant!r} is not one of 1, 2, 4")

    def start(self, w: Tensor, given: Given) -> Tensors:
        check_matrix(w, given.name)  # of zeros a factor makes zeros
        shape = (*w.shape[:-2], (w.shape[-2] + 1) // 2, self.variant)
        return {"alpha": w.new_ones(shape), "theta": w.new_zeros(shape)}

    def count(self, batch: int, m: int, n: int) -> int:
        """2 ⌈m/2⌉ per matrix; two and four times as many in variants 2 and 4."""
        return batch * 2 * ((m + 1) // 2) * self.variant

    def knob_values(self, sites: object) -> tuple[int, ...]:
        return VARIANTS

    def delta(self, f: Factors, w0: Tensor) -> Tensor:
        return self._turned(f, w0)

    def absolute(self, f: Factors, w0: Tensor) -> Tensor:
        alpha, theta = f.alpha.to(w0.dtype).abs(), f.theta.to(w0.dtype)
        along, across = alpha * (1 + 2 * (theta / 2).sin().square()) + 1, alpha * theta.sin().abs()
        return _paired(along, across, w0.abs(), sign=1)

    def acts(self, linear: bool) -> bool:
        return linear

    def act(self, f: Factors, call: Call) -> Tensor:
        return call.placed(self._turned(f, call.outputs().unsqueeze(-1)).squeeze(-1))

    def _turned(self, f: Factors, w: Tensor) -> Tensor:
        """(R − I) w: α cos θ − 1 without a subtraction of large numbers, zero at the start."""
        alpha, theta = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (f.alpha, f.theta))
        along = (alpha - 1) - 2 * alpha * (theta / 2).sin().square()
        return _paired(along.to(w.dtype), (alpha * theta.sin()).to(w.dtype), w, sign=-1)


def _paired(along: Tensor, across: Tensor, w: Tensor, sign: int) -> Tensor:
    """Multiply pairs of rows by 2×2 blocks.

    Args:
        along: the diagonals, (*b, m/2, 1, 2 or 4): per pair, per row, or per entry, of which two are of the diagonal.
        across: what is beside them, in the same form.
        w: rows, (*b, m, n), or (…, m, 1) where the blocks have no batch.
        sign: of the upper one of what is beside the diagonal.
    """
    if along.shape[-1] == 4:
        along, across = along[..., :2], across[..., 2:]
    rows = F.pad(w, (0, 0, 0, w.shape[-2] % 2)).unflatten(-2, (-1, 2))  # (*b, m/2, 2, n)
    swapped = torch.stack([sign * rows[..., 1, :], rows[..., 0, :]], -2)
    change = (along.unsqueeze(-1) * rows + across.unsqueeze(-1) * swapped).flatten(-3, -2)
    return change[..., : w.shape[-2], :]
