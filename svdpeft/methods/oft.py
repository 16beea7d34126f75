"""OFT: turn the inputs of the frozen weight, block by block.

    W' = W0 R        R = blockdiag(R_1, …, R_{n/b})    R_i = (I + Q_i)(I − Q_i)⁻¹    Q_i = −Q_iᵀ, 0 at the start

A rotation keeps the lengths of the rows of W0 and the angles between them. A linear layer is given (R − I) x as another
input, so neither R nor the new weight is built: beside b n multiplications per token it costs one more product with
the frozen weight. Other layers build W0 (R − I), one m×n matrix per forward.

Z. Qiu, W. Liu, H. Feng, Y. Xue, Y. Feng, Z. Liu, D. Zhang, A. Weller, B. Schölkopf.
Controlling Text-to-Image Diffusion by Orthogonal Finetuning. NeurIPS 2023, arXiv:2306.07280. The rotation of the input
and the Neumann series: Z. Qiu, W. Liu, A. Weller, B. Schölkopf. Orthogonal Finetuning Made Scalable. arXiv:2506.19847.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.decomposition import TERMS, cayley_neumann_offset, cayley_offset, check_matrix, skew, skew_count
from svdpeft.methods.base import Call, Factors, Given, Progress, Reference, Tensors, Transform, by_shape
from svdpeft.registry import METHODS


@METHODS.register("oft")
@dataclass(frozen=True)
class OFT(Transform):
    """Rotations of blocks of the input, with the weight's own geometry kept.

    When to use:
        To teach a model a subject or a style without losing what it knows: the singular values of W0 stay as they are.
        It trains n(b − 1)/2 values whatever the number of outputs, and a forward costs about twice the frozen
        layer's. Not where the spectrum itself must change, and no LoRA file can hold the result.

    Paper and code:
        PEFT has the Neumann series on by default, of 5 terms by its count: ``neumann=3`` here, whose polynomial is
            I + 2Q + 2Q² + 2Q³ + Q⁴. Its series turns the other way round than its exact rotation; here both turn
            alike.
        PEFT leaves out the share p of the blocks, rounded down; here each, and each use of a shared one, with p.
        On convolutions PEFT rotates the patches of its input without the layer's stride and adds the overlapping ones
            up, which is not the layer that it merges; here it is W0 R in both.

    Args:
        block_size: b, which divides the number of inputs n; ``clip_rank`` takes the nearest divisor below, or else the
            smallest.
        block_share: one rotation for all blocks of a site.
        eps: COFT: ‖Q_i‖_F is held below eps / √(number of rotations) after each step; the code's value is 6e-5.
        neumann: terms of the series in the place of (I − Q)⁻¹, orthogonal only for small Q; ``None`` solves.
        dropout: probability with which a block of the input is not turned in a training forward (BOFT's paper calls it
            multiplicative dropout).

    Example:
        >>> OFT(block_size=32).count(1, 4096, 1024)  # 1024 · 31 / 2
        15872
    """

    block_size: int = 32
    block_share: bool = False
    eps: float | None = None
    neumann: int | None = None
    dropout: float = 0.0

    learning_rates: ClassVar = {"vision": 3e-3, "language": 3e-4}
    trains: ClassVar = ("Q",)
    knob: ClassVar[str] = "block_size"
    resolved: ClassVar = ("block_size",)
    smallest: ClassVar = (1, 2)
    latex: ClassVar[str] = r"W' = W_0 R,\quad R = \operatorname{blockdiag}(R_i),\quad R_i = (I + Q_i)(I - Q_i)^{-1}"
    reference: ClassVar = Reference(
        key="qiu2023oft",
        authors="Qiu, Zeju and Liu, Weiyang and Feng, Haiwen and Xue, Yuxuan and Feng, Yao and Liu, Zhen and "
        "Zhang, Dan and Weller, Adrian and Schölkopf, Bernhard",
        title="Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
        year=2023,
        venue="Advances in Neural Information Processing Systems",
        arxiv="2306.07280",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block_size(self.block_size)
        if self.eps is not None and self.eps <= 0:
            raise ValueError(f"eps {self.eps} is not positive; None does not constrain the rotations")
        if self.neumann is not None and not 1 <= self.neumann <= TERMS:
            raise ValueError(f"neumann {self.neumann} is outside [1, {TERMS}], the powers of Q; None solves exactly")

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()) -> OFT:
        return dataclasses.replace(self, block_size=fitting(self.block_size, n, site, clip))

    def start(self, w: Tensor, given: Given) -> Tensors:
        check_matrix(w, given.name)  # of zeros a factor makes zeros
        blocks = 1 if self.block_share else w.shape[-1] // self.block_size
        return {"Q": w.new_zeros(*w.shape[:-2], blocks, skew_count(self.block_size))}

    def count(self, batch: int, m: int, n: int) -> int:
        """n (b − 1)/2 per matrix; b (b − 1)/2 where the blocks share one rotation."""
        return batch * (1 if self.block_share else n // self.block_size) * skew_count(self.block_size)

    def knob_values(self, sites: Sequence[Given]) -> Sequence[int]:
        return block_sizes(sites)

    def delta(self, f: Factors, w0: Tensor) -> Tensor:
        return blockwise(w0, turns(f.Q.to(w0.dtype), self.block_size, self.neumann))

    def absolute(self, f: Factors, w0: Tensor) -> Tensor:
        return blockwise(w0.abs(), turns(f.Q.to(w0.dtype), self.block_size, self.neumann).abs())

    def thinned(self, f: Factors) -> Factors:
        return with_blocks_left_out(f, self.dropout, (f.shape[-1] // self.block_size,))

    def acts(self, linear: bool) -> bool:
        return linear

    def act(self, f: Factors, call: Call) -> Tensor:
        t = turns(f.Q, self.block_size, self.neumann).to(call.x.dtype)
        return call.frozen(blockwise(call.x, t.mT))  # (R − I) x of a row vector is x (R − I)ᵀ

    @property
    def has_step(self) -> bool:
        return self.eps is not None

    @torch.no_grad()
    def after_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        if self.eps is None:
            return
        for group in by_shape([f.Q for f in sites]):
            q = torch.stack([sites[i].Q for i in group])
            size = math.sqrt(2) * torch.linalg.vector_norm(q, dim=-1, keepdim=True)  # ‖Q‖_F: each value stands twice
            limit = self.eps / math.sqrt(q.shape[-2])
            for i, projected in zip(group, q * (limit / size).clamp(max=1), strict=True):
                sites[i].Q.copy_(projected)


def turns(values: Tensor, size: int, neumann: int | None = None) -> Tensor:
    """Return R − I of every block, (*b, blocks, size, size), from its free values, (*b, blocks, size(size − 1)/2)."""
    q = skew(values, size)
    return cayley_offset(q) if neumann is None else cayley_neumann_offset(q, neumann)


def with_blocks_left_out(f: Factors, dropout: float, shape: tuple[int, ...]) -> Factors:
    """The tensors of one forward in which some rotations, drawn anew, are the identity: their Q is zero.

    Args:
        f: of the site, with Q of (*b, *shape, values), or one for all blocks.
        dropout: probability of each.
        shape: of the rotations.
    """
    kept = torch.rand(*f.Q.shape[: -len(shape) - 1], *shape, 1, device=f.Q.device) >= dropout
    return f.instead(Q=f.Q * kept)


def blockwise(w: Tensor, t: Tensor) -> Tensor:
    """Multiply rows by a block-diagonal matrix from the right.

    Args:
        w: rows, (*b, m, n), or (…, n) where the blocks have no batch.
        t: the blocks, (*b, n/s, s, s), or one for all of them, (*b, 1, s, s).
    """
    rows = w.reshape(-1, w.shape[-1]) if t.ndim == 3 else w
    blocks = rows.unflatten(-1, (-1, t.shape[-1]))  # (*b, m, n/s, s)
    t = t.expand(*t.shape[:-3], blocks.shape[-2], -1, -1)
    return torch.einsum("...mkj,...kjc->...mkc", blocks, t).reshape(w.shape)


def check_block_size(size: int) -> None:
    """Raise ``ValueError`` where no rotation has this size."""
    if size < 2:
        raise ValueError(f"block_size {size} is below 2: there is nothing to rotate")


def fitting(size: int, n: int, site: str, clip: bool) -> int:
    """Return the block size at a site with n inputs.

    Example:
        >>> fitting(4, 9, "fc", clip=True), fitting(4, 7, "fc", clip=True)
        (3, 7)
    """
    divisors = [d for d in range(2, n + 1) if n % d == 0]
    if not divisors:
        raise ValueError(f"{site} has {n} input: there is nothing to rotate; leave it out with exclude=")
    below = [d for d in divisors if d <= size]
    if size in divisors:
        return size
    if clip:
        return below[-1] if below else divisors[0]
    near = " and ".join(str(d) for d in (below[-1:] + [d for d in divisors if d > size][:1]))
    raise ValueError(
        f"block_size {size} does not divide the {n} inputs of {site}: {near} would; clip_rank=True chooses one"
    )


def block_sizes(sites: Sequence[Given]) -> Sequence[int]:
    """Every block size that divides the inputs of one of the sites."""
    widths = {site.shape[2] for site in sites}
    return sorted({d for n in widths for d in range(2, n + 1) if n % d == 0}) or [2]
