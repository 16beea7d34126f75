"""LoReFT: edit a layer's output within a few of its directions, from what it holds there.

    W' = (I + Rᵀ(W − R)) W0        R, W (r, m)    R Rᵀ = I    W = R at the start
    after each step:  R ← polar(R)
    variant "direft":  W' = (I + RᵀW) W0        W = 0, R not orthonormal

So an output h becomes h + Rᵀ(W h − R h): in the directions that the rows of R span, what h has there is exchanged for
W h. The change is a product of thin factors, Rᵀ and (W − R) W0.

Z. Wu, A. Arora, Z. Wang, A. Geiger, D. Jurafsky, C. D. Manning, C. Potts. ReFT: Representation Finetuning for Language
Models. NeurIPS 2024, arXiv:2404.03592.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdpeft.decomposition import Product, check_matrix, check_rank
from svdpeft.decomposition.orthonormality import polar
from svdpeft.methods.base import (
    Factors,
    Given,
    Progress,
    Reference,
    Tensors,
    ThinTransform,
    by_shape,
    generator,
)
from svdpeft.methods.base.drawn import kaiming, orthonormal
from svdpeft.patterns import chosen
from svdpeft.registry import METHODS

VARIANTS = ("loreft", "direft")


@METHODS.register("loreft")
@dataclass(frozen=True)
class LoReFT(ThinTransform):
    """An intervention on what a layer gives, as a change of its weight: it can be merged, and a LoRA file holds it.

    When to use:
        Where the output of a layer matters and not its input: ranks of 1 to 8, on the layers that write into the
        residual stream (``targets=["o_proj", "down_proj"]``). The update reads nothing of the input that W0 does not
        pass on. On a convolution with groups each group has its own R and W, and on an embedding a row of the matrix is
        a token.

    Paper and code:
        The paper edits the residual stream after chosen blocks, at the first and last few tokens of a prompt. Where a
            prompt ends is nothing that a weight could know: here every position is edited, and a layer's output.
        The paper edits h with its bias b, and adds Rᵀc. Here, as with every method, the bias is the base's own and
            stays: on a layer without one the two are alike but for c. ``train=`` takes the bias where there is one.
        The paper draws W and c, off the base model; here W starts as R, or as zero in "direft".
        pyreft keeps R orthonormal by a parametrisation; here a retraction after each step does.
        Dropout on the output is not offered.

    Args:
        rank: r, at most the number of outputs, or a mapping from site pattern to r.
        variant: ``"loreft"``, or ``"direft"``, without the constraint.

    Example:
        >>> LoReFT(rank=4).count(1, 1024, 4096)
        8192
    """

    rank: int | Mapping[str, int] = 4
    variant: Literal["loreft", "direft"] = "loreft"

    draws: ClassVar = True
    trains: ClassVar = ("R", "W")
    resolved: ClassVar = ("rank",)
    learning_rates: ClassVar = {"vision": 3e-3, "language": 9e-4}
    latex: ClassVar[str] = r"W' = (I + R^\top (W - R))\, W_0,\qquad R R^\top = I"
    reference: ClassVar = Reference(
        key="wu2024reft",
        authors="Wu, Zhengxuan and Arora, Aryaman and Wang, Zheng and Geiger, Atticus and Jurafsky, Dan and "
        "Manning, Christopher D. and Potts, Christopher",
        title="ReFT: Representation Finetuning for Language Models",
        year=2024,
        venue="Advances in Neural Information Processing Systems",
        arxiv="2404.03592",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise ValueError(f"variant {self.variant!r} is neither 'loreft' nor 'direft'")

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()) -> LoReFT:
        rank = chosen(self.rank, site, roles)
        return dataclasses.replace(self, rank=check_rank(min(rank, m) if clip else rank, m, n, site, m))

    def start(self, w: Tensor, given: Given) -> Tensors:
        check_matrix(w, given.name)  # of zeros a factor makes zeros
        *batch, m, _ = w.shape
        source = generator(given.seed)
        if self.variant == "direft":
            r = kaiming(*batch, self._rank, m, source=source).to(w)
            return {"R": r, "W": torch.zeros_like(r)}
        r = orthonormal(*batch, m, self._rank, source=source).mT.to(w)
        return {"R": r, "W": r.clone()}

    def count(self, batch: int, m: int, n: int) -> int:
        """2 r m per matrix."""
        return batch * 2 * self._rank * m

    def export_rank(self, m: int, n: int) -> int:
        return min(self._rank, m, n)

    def thin(self, f: Factors, w0: Tensor) -> Product:
        rows, edit = f.R.to(w0.dtype), f.W.to(w0.dtype)
        return Product(rows.mT, None, (edit if self.variant == "direft" else edit - rows) @ w0)

    def absolute(self, f: Factors, w0: Tensor) -> Tensor:
        rows, edit = f.R.to(w0.dtype).abs(), f.W.to(w0.dtype).abs()
        return rows.mT @ ((edit if self.variant == "direft" else edit + rows) @ w0.abs())

    @property
    def has_step(self) -> bool:
        return self.variant == "loreft"

    @torch.no_grad()
    def after_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        if self.variant == "direft":
            return
        bases = [f.R.mT for f in sites]
        for group in by_shape(bases):
            found = polar(torch.stack([bases[i] for i in group]))
            torch._foreach_copy_([bases[i] for i in group], list(found.unbind()))
