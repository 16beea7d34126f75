"""FLoRA: multiply the weight, entry by entry, by a matrix of low rank.

    W' = W0 ∘ L A        L = [1 | 0]    A = [1 ; N(0, 1)], so that L A is all ones at the start

    y = Σ_j L_j ∘ (W0 (A_j ∘ x)), the paper's form: each example of a batch can have an adapter of its own

Y. Wen, S. Chaudhuri. Batched Low-Rank Adaptation of Foundation Models. ICLR 2024, arXiv:2312.05677.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.decomposition import check_matrix
from svdpeft.methods.base import Call, Factors, Given, Reference, Tensors, generator
from svdpeft.methods.base.hadamard import Hadamard
from svdpeft.registry import METHODS


@METHODS.register("flora")
@dataclass(frozen=True)
class FLoRA(Hadamard):
    """A multiplicative update: every entry of the weight is scaled, and what is zero stays zero.

    When to use:
        For batches whose examples each have an adapter of their own (``adapter.per_example``), which is what the paper
        is about, with a rank of 1 to 4. For one adapter per model LoRA is cheaper: a rank of r costs r products with
        the frozen weight per forward, or one m×n matrix from rank 5 on and on layers that are not linear. The result
        can be merged, and no LoRA file can hold it.

    Paper and code:
        The paper leaves the start open; here the first term is all ones and the others have L = 0, so that the start
            is the base model and no two terms are alike. Its namesakes, for compressed gradients and for convolutions,
            are other methods.

    Args:
        rank: r, number of terms, or a mapping from site pattern to r.

    Example:
        >>> FLoRA(rank=2).count(1, 30, 20)  # 2 · 50
        100
    """

    rank: int | Mapping[str, int] = 1

    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    latex: ClassVar[str] = r"W' = W_0 \circ L A,\quad L A = \mathbf{1}\mathbf{1}^\top \text{ at the start}"
    reference: ClassVar = Reference(
        key="wen2024flora",
        authors="Wen, Yeming and Chaudhuri, Swarat",
        title="Batched Low-Rank Adaptation of Foundation Models",
        year=2024,
        venue="International Conference on Learning Representations",
        arxiv="2312.05677",
    )

    @property
    def draws(self) -> bool:  # type: ignore[override]
        return self.rank != 1  # of one term every entry is a one

    def start(self, w: Tensor, given: Given) -> Tensors:
        check_matrix(w, given.name)  # of zeros a factor makes zeros
        *batch, m, n = w.shape
        left = w.new_zeros(*batch, m, self._rank)
        left[..., 0] = 1
        right = torch.randn(*batch, self._rank, n, generator=generator(given.seed), dtype=torch.float64).to(w)
        right[..., 0, :] = 1
        return {"L": left, "A": right}

    def delta(self, f: Factors, w0: Tensor) -> Tensor:
        return w0 * (f.L.to(w0.dtype) @ f.A.to(w0.dtype) - 1)

    def absolute(self, f: Factors, w0: Tensor) -> Tensor:
        return w0.abs() * (f.L.abs() @ f.A.abs() + 3)  # of each term and of W0 itself

    def act(self, f: Factors, call: Call) -> Tensor:
        # With u = L₁ − 1 and v = A₁ − 1 the first term less W0 x is W0 (v∘x) + u∘W0 x + u∘W0 (v∘x): no big numbers
        # are subtracted, and it is zero at the start.
        u, v = f.L[..., 0] - 1, f.A[..., 0, :] - 1
        return self.terms(f, call, call.rows(u) + call.per_row(u + 1) * call.columns(v), 1)
