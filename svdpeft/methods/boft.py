"""BOFT: turn the inputs of the frozen weight by a product of sparse rotations, as the fast Fourier transform does.

    W' = diag(s) W0 R_1 R_2 … R_N        R_j = P_jᵀ blockdiag(Cayley(Q_j1), …, Cayley(Q_j,n/b)) P_j    Q = 0, s = 1

P_j is the butterfly: R_j mixes half-blocks that are 2^(j − 1) half-blocks apart, so that after N factors each input can
reach b 2^(N − 1) others. N = 1 is OFT with a scale per output. The permutations are reshapes: nothing of size n×n is
built. A linear layer is given (R − I) x as another input, at b n N multiplications per token and one more product with
the frozen weight; other layers build one m×n matrix per forward.

W. Liu, Z. Qiu, Y. Feng, Y. Xiu, Y. Xue, L. Yu, H. Feng, Z. Liu, J. Heo, S. Peng, Y. Wen, M. J. Black, A. Weller,
B. Schölkopf. Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization. ICLR 2024, arXiv:2311.06243.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.decomposition import check_matrix, skew_count
from svdpeft.methods.base import Call, Factors, Given, Reference, Tensors, Transform
from svdpeft.methods.oft import block_sizes, blockwise, check_block_size, fitting, turns, with_blocks_left_out
from svdpeft.registry import METHODS


@METHODS.register("boft")
@dataclass(frozen=True)
class BOFT(Transform):
    """Butterflies of small rotations reach across blocks with few values, and each output gets a scale.

    When to use:
        As OFT, where its blocks are too narrow and larger ones too dear: N factors of blocks of b cost N n(b − 1)/2
        values and reach b 2^(N − 1) inputs. Each factor is another pass over the input; with N = 1 OFT is simpler.

    Paper and code:
        PEFT stores full b×b blocks and uses their skew part alone, N n b + m values for our N n(b − 1)/2 + m.
        Without its CUDA extension PEFT sets N to 1 without a word, and it holds each permutation as an n×n matrix.
        PEFT leaves out a fixed number of blocks of one factor drawn at random; here each block of each factor is left
            out with probability p.

    Args:
        block_size: b, which divides the number of inputs n; even where there are several factors. ``clip_rank`` takes
            the nearest divisor below, or else the smallest.
        butterflies: N; b 2^(N − 1) divides n, ``clip_rank`` lowers it.
        dropout: probability with which a block of a factor is the identity in a training forward: the paper's
            multiplicative dropout.

    Example:
        >>> BOFT(block_size=4, butterflies=2).count(1, 10, 16)  # 2 · 16 · 3/2 + 10
        58
    """

    block_size: int = 4
    butterflies: int = 1
    dropout: float = 0.0

    learning_rates: ClassVar = {"vision": 3e-3, "language": 3e-4}
    trains: ClassVar = ("Q", "s")
    knob: ClassVar[str] = "block_size"
    resolved: ClassVar = ("block_size", "butterflies")
    smallest: ClassVar = (1, 2)
    latex: ClassVar[str] = (
        r"W' = \operatorname{diag}(s)\, W_0 \prod_{j=1}^{N} P_j^\top \operatorname{blockdiag}"
        r"\bigl((I + Q_{ji})(I - Q_{ji})^{-1}\bigr) P_j"
    )
    reference: ClassVar = Reference(
        key="liu2024boft",
        authors="Liu, Weiyang and Qiu, Zeju and Feng, Yao and Xiu, Yuliang and Xue, Yuxuan and Yu, Longhui and "
        "Feng, Haiwen and Liu, Zhen and Heo, Juyeon and Peng, Songyou and Wen, Yandong and Black, Michael J. and "
        "Weller, Adrian and Schölkopf, Bernhard",
        title="Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization",
        year=2024,
        venue="International Conference on Learning Representations",
        arxiv="2311.06243",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block_size(self.block_size)
        if self.butterflies < 1:
            raise ValueError(f"butterflies {self.butterflies} is below 1")
        if self.butterflies > 1 and self.block_size % 2:
            raise ValueError(
                f"block_size {self.block_size} is odd: butterflies={self.butterflies} exchange halves of blocks; "
                f"{self.block_size + 1} is even"
            )

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()) -> BOFT:
        size, most = fitting(self.block_size, n, site, clip), 1
        while size % 2 == 0 and n % (size * 2**most) == 0:
            most += 1
        if self.butterflies > most and not clip:
            raise ValueError(
                f"butterflies {self.butterflies} at {site}: {size} · 2^{self.butterflies - 1} does not divide its {n} "
                f"inputs; at most {most}, or clip_rank=True"
            )
        return dataclasses.replace(self, block_size=size, butterflies=min(self.butterflies, most))

    def start(self, w: Tensor, given: Given) -> Tensors:
        check_matrix(w, given.name)  # of zeros a factor makes zeros
        *batch, m, n = w.shape
        q = w.new_zeros(*batch, self.butterflies, n // self.block_size, skew_count(self.block_size))
        return {"Q": q, "s": w.new_ones(*batch, m)}

    def count(self, batch: int, m: int, n: int) -> int:
        """N n (b − 1)/2 + m per matrix."""
        return batch * (self.butterflies * (n // self.block_size) * skew_count(self.block_size) + m)

    def turned(self, value: int) -> BOFT:
        return dataclasses.replace(self, block_size=value, butterflies=self.butterflies if value % 2 == 0 else 1)

    def knob_values(self, sites: Sequence[Given]) -> Sequence[int]:
        # A larger block leaves room for fewer butterflies: the counts need not grow with it.
        return sorted(block_sizes(sites), key=lambda size: self.turned(size).total(sites))

    def delta(self, f: Factors, w0: Tensor) -> Tensor:
        s = f.s.to(w0.dtype).unsqueeze(-1)
        return s * self._turned_by(w0, self._turns(f).to(w0.dtype), range(self.butterflies)) + (s - 1) * w0

    def absolute(self, f: Factors, w0: Tensor) -> Tensor:
        each = torch.eye(w0.shape[-1], dtype=w0.dtype, device=w0.device).expand(*w0.shape[:-2], -1, -1)
        total = each
        for j in range(self.butterflies):
            total = total @ (each + self._turned_by(each, self._turns(f).to(w0.dtype), [j]).abs())
        return f.s.abs().unsqueeze(-1) * (w0.abs() @ total) + w0.abs()

    def thinned(self, f: Factors) -> Factors:
        return with_blocks_left_out(f, self.dropout, (self.butterflies, f.shape[-1] // self.block_size))

    def acts(self, linear: bool) -> bool:
        return linear

    def act(self, f: Factors, call: Call) -> Tensor:
        t = self._turns(f).to(call.x.dtype).mT  # rows of inputs: the transposed factors in reverse order
        turned = call.frozen(self._turned_by(call.x, t, range(self.butterflies - 1, -1, -1)))
        return call.per_row(f.s) * turned + call.rows(f.s - 1)

    def _turns(self, f: Factors) -> Tensor:
        """R_j − I, (*b, N, n/b, b, b)."""
        return turns(f.Q.to(torch.promote_types(f.Q.dtype, torch.float32)), self.block_size)

    def _turned_by(self, w: Tensor, t: Tensor, order: Sequence[int]) -> Tensor:
        """Return w R − w of rows w for the product R of the factors in this order: zero where all of them are."""
        change = torch.zeros_like(w)
        for j in order:
            change = change + apart(
                blockwise(together(w + change, self.block_size, 2**j), t.select(-4, j)), self.block_size, 2**j
            )
        return change


def together(x: Tensor, size: int, stride: int) -> Tensor:
    """Bring half-blocks that are ``stride`` half-blocks apart side by side: P_j on the last axis.

    Example:
        >>> together(torch.arange(8), 2, 4).tolist()
        [0, 4, 1, 5, 2, 6, 3, 7]
    """
    if stride == 1:
        return x
    return x.unflatten(-1, (-1, 2, stride, size // 2)).transpose(-3, -2).flatten(-4)


def apart(x: Tensor, size: int, stride: int) -> Tensor:
    """The inverse of ``together``."""
    if stride == 1:
        return x
    return x.unflatten(-1, (-1, stride, 2, size // 2)).transpose(-3, -2).flatten(-4)
