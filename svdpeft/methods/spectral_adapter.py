"""Spectral Adapter: move the top singular vectors of the weight, by adding to them or by rotating them.

    additive      W' = W0 + (U + P) Σ (V + Q)ᵀ − U Σ Vᵀ                             P = 0    Q = 0
    rotational    W' = W0 + U (R(X) diag(σ∘c) R(Y)ᵀ − diag(σ)) Vᵀ                   X = 0    Y = 0    c = 1
                  R(X) = (I + K)(I − K)⁻¹,  K = (X − Xᵀ)/2

U, Σ, V are the window [offset, offset + r) of the weight's singular triplets, frozen. Adapters of several concepts with
disjoint windows can be added up without meeting.

F. Zhang, M. Pilanci. Spectral Adapter: Fine-Tuning in Spectral Space. NeurIPS 2024, arXiv:2405.13952.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.decomposition import SVD, Product, cayley_offset, full_precision, truncated_svd
from svdpeft.methods.base import Decomposed, Factors, Given, Reference, Tensors, Unscaled
from svdpeft.registry import METHODS


@dataclass(frozen=True)
class Window(Decomposed, Unscaled):
    """What both adapters share: a window of frozen singular triplets.

    Args:
        offset: first triplet of the window; a negative one is counted from the last of min(m, n).
    """

    offset: int = 0

    reference: ClassVar = Reference(
        key="zhang2024spectral",
        authors="Zhang, Fangzhao and Pilanci, Mert",
        title="Spectral Adapter: Fine-Tuning in Spectral Space",
        year=2024,
        venue="Advances in Neural Information Processing Systems",
        arxiv="2405.13952",
    )

    def first(self, m: int, n: int) -> int:
        """The window's first triplet, counted from 0."""
        return self.offset if self.offset >= 0 else min(m, n) + self.offset

    def default_rank(self, m: int, n: int) -> int:
        return self.rank_limit(m, n)

    def rank_limit(self, m: int, n: int) -> int:
        return min(m, n) - self.first(m, n)

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()):
        k = min(m, n)
        if not -k <= self.offset < k:
            raise ValueError(f"offset {self.offset} is outside [{-k}, {k - 1}] at {site} ({m}x{n})")
        return super().at(site, m, n, clip, roles)

    def svd(self, w: Tensor, given: Given) -> SVD:
        first = self.first(*w.shape[-2:])
        u, s, vh = truncated_svd(w, first + self._rank, self.driver, seed=given.seed, where=given.name)
        return SVD(u[..., first:].contiguous(), s[..., first:].clone(), vh[..., first:, :].clone())


@METHODS.register("spectral-adapter")
@dataclass(frozen=True)
class SpectralAdapter(Window):
    """Adds to the top singular vectors; the singular values weigh what is learned.

    When to use:
        For LoRA's number of values with twice its rank of change, aimed at the directions that matter most in the
        base; and to fuse several concepts, each trained in a window of its own (``offset=0``, ``offset=r``, …). The
        steps grow with σ: a learning rate far below LoRA's is needed (the paper's is 1e-5).

    Paper and code:
        The published diffusion code also learns the singular values: ``values=True``. Its window number i is
        ``offset=i * rank``, its bottom window ``offset=-rank``; a free list of columns is not offered.
        The published code for language models rounds the rest of the weight to bfloat16 and merges in float16; not
        offered. Like it, this has no α; unlike it, dropout works.

    Args:
        offset: first triplet of the window; a negative one is counted from the last of min(m, n).
        values: learn the singular values of the window, too.
    """

    values: bool = False

    learning_rates: ClassVar = {"vision": 3e-3, "language": 2e-4}
    latex: ClassVar[str] = r"W' = W_0 + (U_r + P)\,\Sigma_r\,(V_r + Q)^\top - U_r \Sigma_r V_r^\top,\quad P_0 = Q_0 = 0"

    @property
    def trains(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("P", "Q", "D") if self.values else ("P", "Q")

    def start(self, w: Tensor, given: Given) -> Tensors:
        u, s, vh = self.svd(w, given)
        tensors = {"L": u, "C": s, "A": vh, "P": torch.zeros_like(u), "Q": torch.zeros_like(vh)}
        return tensors | ({"D": torch.zeros_like(s)} if self.values else {})

    def now(self, f: Factors) -> Product:
        return Product(f.L + f.P, f.C + f.D if self.values else f.C, f.A + f.Q)

    def update(self, f: Factors) -> Product:
        # (U+P)(Σ+D)(V+Q)ᵀ − UΣVᵀ = [P(Σ+D) + UD | UΣ] [(V+Q)ᵀ ; Qᵀ]: nothing large is subtracted.
        moved = f.P * (f.C + f.D).unsqueeze(-2) + f.L * f.D.unsqueeze(-2) if self.values else f.P * f.C.unsqueeze(-2)
        left = torch.cat([moved, f.L * f.C.unsqueeze(-2)], -1)
        return Product(left, None, torch.cat([f.A + f.Q, f.Q], -2))

    def count(self, batch: int, m: int, n: int) -> int:
        """r (m + n) per matrix, and r more with the singular values."""
        return batch * self._rank * (m + n + self.values)

    def export_rank(self, m: int, n: int) -> int:
        return min(2 * self._rank, m, n)


@METHODS.register("spectral-adapter-r")
@dataclass(frozen=True)
class SpectralAdapterR(Window):
    """Rotates the top singular vectors within their span and rescales the singular values.

    When to use:
        For budgets far below LoRA's: the count depends on r alone and not on the size of the layer. The update
        never leaves the span of the chosen vectors; at rank 1 there is nothing to rotate and only c trains. Each
        forward solves two systems of size r.

    Paper and code:
        The published code takes (I − K)(I + K)⁻¹, the inverse rotation: X and Y with the other sign.

    Args:
        offset: first triplet of the window; a negative one is counted from the last of min(m, n).
    """

    learning_rates: ClassVar = {"vision": 1e-3, "language": 2e-4}
    latex: ClassVar[str] = (
        r"W' = W_0 + U_r\,(R(X)\,\mathrm{diag}(\sigma\circ c)\,R(Y)^\top - \mathrm{diag}(\sigma))\,V_r^\top,"
        r"\quad X_0 = Y_0 = 0,\; c_0 = 1"
    )

    @property
    def trains(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("c",) if self.rank == 1 else ("X", "Y", "c")  # a single vector has nowhere to turn

    def start(self, w: Tensor, given: Given) -> Tensors:
        u, s, vh = self.svd(w, given)
        square = s.new_zeros(*s.shape, s.shape[-1])
        return {"L": u, "C": s, "A": vh, "X": square, "Y": square.clone(), "c": torch.ones_like(s)}

    def core(self, f: Factors) -> Tensor:
        return torch.diag_embed(f.C) + self._change(f)

    def update(self, f: Factors) -> Product:
        return Product(f.L, self._change(f), f.A)

    def _change(self, f: Factors) -> Tensor:
        """The core less diag(σ): with R = I + E, the terms of first order in E and c − 1 are formed alone."""
        left, right = (cayley_offset((x - x.mT) / 2) for x in (f.X, f.Y))  # E, (*b, r, r)
        sigma = f.C * f.c
        left = left * sigma.unsqueeze(-2)
        with full_precision(left):
            second = left @ right.mT
        return torch.diag_embed(f.C * (f.c - 1)) + left + sigma.unsqueeze(-1) * right.mT + second

    def count(self, batch: int, m: int, n: int) -> int:
        """2 r² + r per matrix; at rank 1 the one of c."""
        return batch * (1 if self._rank == 1 else self._rank * (2 * self._rank + 1))
