"""PiCa: train one factor on the weight's leading input directions, shared by all layers of one module type.

    W' = W0 + s M V_rᵀ        M = 0    s = α/r

The paper writes y = x W and projects on the columns U_r of that W; here, with y = W x, they are the rows V_rᵀ.
V_rᵀ is each site's own and frozen; M (m×r) trains, one for all sites of one leaf name, shape and rank.

J. Hwang, W. Cho, T. Kim. PiCa: Parameter-Efficient Fine-Tuning with Column Space Projection. ICLR 2026,
arXiv:2505.20211.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from svdpeft.methods.base import Decomposed, Given, Reference, Scaled, Tensors
from svdpeft.registry import METHODS


@METHODS.register("pica")
@dataclass(frozen=True)
class PiCa(Decomposed, Scaled):
    """A large rank at a small price: the blocks share the trained factor, each has its own frozen projection.

    When to use:
        Deep models of equal blocks, where one M for all queries, say, divides the count by the depth and pays for a
        rank of 256. The memory of the frozen V_rᵀ stays per site (r n values each, in the file too). With few blocks,
        or blocks that must learn different things, ``tied=False`` or LoRA.

    Paper and code:
        The README's table of sizes does not follow from the sharing it describes; here M is counted once per group.

    Args:
        tied: one M per module type, as in the paper; ``False``: one per site.
    """

    rank: int | dict[str, int] | None = 256
    tied: bool = True

    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    trains: ClassVar[tuple[str, ...]] = ("L",)
    anchored: ClassVar[bool] = False
    reference: ClassVar = Reference(
        key="hwang2026pica",
        authors="Hwang, Junseo and Cho, Wonguk and Kim, Taesup",
        title="PiCa: Parameter-Efficient Fine-Tuning with Column Space Projection",
        year=2026,
        venue="International Conference on Learning Representations",
        arxiv="2505.20211",
    )
    latex: ClassVar[str] = r"W' = W_0 + s\, M V_r^\top"

    def group(self, given: Given) -> str | None:
        return f"{given.module_type()} {given.shape} r={self._rank}" if self.tied else None

    def share(self, group: Sequence[Given]) -> Tensors:
        w = group[0].weight()  # for its shape
        return {"L": w.new_zeros(*w.shape[:-1], self._rank)}

    def start(self, w: Tensor, given: Given) -> Tensors:
        tensors = {"A": self.svd(w, given).vh}
        return tensors if self.tied else tensors | {"L": w.new_zeros(*w.shape[:-1], self._rank)}

    def count(self, batch: int, m: int, n: int) -> int:
        """r m per matrix, or per group of tied sites."""
        return 0 if self.tied else batch * self._rank * m

    def shared_count(self, group: Sequence[Given]) -> int:
        batch, m, _ = group[0].shape
        return batch * self._rank * m
