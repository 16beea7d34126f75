"""HiRA: an update of high rank, the weight itself times a matrix of low rank, entry by entry.

    W' = W0 ∘ (1 + L A)        L = 0    A ~ U(−1/√n, 1/√n)

Its rank is at most r times that of W0, which is in general all of it.

Q. Huang, T. Ko, Z. Zhuang, L. Tang, Y. Zhang. HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large
Language Models. ICLR 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from svdpeft.decomposition import check_matrix
from svdpeft.methods.base import Call, Factors, Given, Reference, Tensors, generator
from svdpeft.methods.base.drawn import kaiming
from svdpeft.methods.base.hadamard import Hadamard
from svdpeft.registry import METHODS


@METHODS.register("hira")
@dataclass(frozen=True)
class HiRA(Hadamard):
    """Each entry of the weight grows or shrinks by a share of itself, and the shares have low rank.

    When to use:
        For LoRA's count of values and an update that is not of low rank. What W0 has as zero stays zero. Every forward
        builds one m×n matrix, or up to rank 4 and on linear layers r products with the frozen weight; the weight's
        values are needed for it, also where they are quantised. No LoRA file can hold the result.

    Paper and code:
        The published code has a variant with a random matrix in the place of W0: not here.
        PEFT drops entries of the input of the added part (``hira_dropout``), and on an embedding it starts with the
            other factor at zero.

    Args:
        rank: r, or a mapping from site pattern to r.

    Example:
        >>> HiRA(rank=32).count(1, 4096, 1024)  # as a LoRA of this rank
        163840
    """

    rank: int | Mapping[str, int] = 32

    draws: ClassVar = True
    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    latex: ClassVar[str] = r"W' = W_0 \circ (\mathbf{1}\mathbf{1}^\top + L A),\quad L_0 = 0"
    reference: ClassVar = Reference(
        key="huang2025hira",
        authors="Huang, Qiushi and Ko, Tom and Zhuang, Zhan and Tang, Lilian and Zhang, Yu",
        title="HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models",
        year=2025,
        venue="International Conference on Learning Representations",
    )

    def start(self, w: Tensor, given: Given) -> Tensors:
        check_matrix(w, given.name)  # of zeros a factor makes zeros
        *batch, m, n = w.shape
        a = kaiming(*batch, self._rank, n, source=generator(given.seed))
        return {"L": w.new_zeros(*batch, m, self._rank), "A": a.to(w)}

    def delta(self, f: Factors, w0: Tensor) -> Tensor:
        return w0 * (f.L.to(w0.dtype) @ f.A.to(w0.dtype))

    def absolute(self, f: Factors, w0: Tensor) -> Tensor:
        return w0.abs() * (f.L.abs() @ f.A.abs())

    def act(self, f: Factors, call: Call) -> Tensor:
        return self.terms(f, call, call.per_row(f.L[..., 0]) * call.columns(f.A[..., 0, :]), 1)
