"""C3A: an update of circulant blocks, which multiplies by circular convolution.

    W' = W0 + ΔW        ΔW = (1/n) [C(w_ij)]        w = 0

m/b × n/b blocks; C(w) of b values is the b×b matrix with w as its first row, and below each row the same turned by one
place, so that C(w) x = F(F(w) ∘ F⁻¹(x)). A linear layer goes that way and does not build ΔW.

A. Chen, J. Cheng, Z. Liu, Z. Gao, F. Tsung, Y. Li, J. Li. Parameter-Efficient Fine-Tuning via Circular Convolution.
arXiv:2407.19342.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.methods.base import Call, Factors, Given, Reference, Tensors, Transform, generator
from svdpeft.methods.base.divisors import common
from svdpeft.registry import METHODS


@METHODS.register("c3a")
@dataclass(frozen=True)
class C3A(Transform):
    """Each block of the update is one vector, turned by one place from row to row.

    When to use:
        For an update of high rank at m n / b values, on layers whose sides have a common divisor worth the name. A
        linear layer's forward takes m n / b products and Fourier transforms, which are computed in float32 at least.
        Not where m and n have no divisor in common: then b is 1, and ΔW is trained whole. No LoRA holds the result.

    Paper and code:
        The paper, and PEFT unless ``init_weights=True``, draw w from the uniform distribution of Xavier, a little off
            the base model: reference_init=True. Here w is zero at the start, which stops no gradient.
        The paper's rates are up to 7 on vision tasks, because of the 1/n.
        From b = 3 on PEFT's gradient of the input, of its own backward pass, is not that of its forward; here autograd
            makes it.
        PEFT gives each of several active adapters the output of the one before for its input; here all see the layer's.

    Args:
        block_size: b, which divides m and n; ``clip_rank`` takes the nearest divisor below.
        reference_init: start as the paper does.

    Example:
        >>> C3A(block_size=64).count(1, 1024, 4096)
        65536
    """

    block_size: int = 64
    reference_init: bool = False

    trains: ClassVar = ("w",)
    knob: ClassVar[str] = "block_size"
    resolved: ClassVar = ("block_size",)
    learning_rates: ClassVar = {"vision": 3e-1, "language": 1e-1}
    latex: ClassVar[str] = r"W' = W_0 + \frac{1}{n}\, [\mathcal{C}(w_{ij})]"
    reference: ClassVar = Reference(
        key="chen2024c3a",
        authors="Chen, Aochuan and Cheng, Jiashun and Liu, Zijing and Gao, Ziqi and Tsung, Fugee and Li, Yu and "
        "Li, Jia",
        title="Parameter-Efficient Fine-Tuning via Circular Convolution",
        year=2024,
        arxiv="2407.19342",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1:
            raise ValueError(f"block_size {self.block_size} is below 1")

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()) -> C3A:
        return dataclasses.replace(self, block_size=common(self.block_size, m, n, site, clip))

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        return not self.reference_init

    @property
    def draws(self) -> bool:  # type: ignore[override]
        return self.reference_init

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        shape = (*batch, m // self.block_size, n // self.block_size, self.block_size)
        if not self.reference_init:
            return {"w": w.new_zeros(shape)}
        drawn = 2 * torch.rand(shape, generator=generator(given.seed), dtype=torch.float64) - 1
        return {"w": (drawn * math.sqrt(6 / (m + n))).to(w)}

    def count(self, batch: int, m: int, n: int) -> int:
        """m n / b per matrix."""
        return batch * m * n // self.block_size

    def knob_values(self, sites: Sequence[Given]) -> list[int]:
        """Block sizes from large to small: the smaller the blocks, the more values."""
        shared = {math.gcd(*site.shape[1:]) for site in sites}
        return sorted({d for k in shared for d in range(1, k + 1) if k % d == 0}, reverse=True)

    def delta(self, f: Factors, w0: Tensor) -> Tensor:
        b = self.block_size
        place = torch.arange(b, device=w0.device)
        blocks = f.w.to(w0.dtype)[..., (place - place.unsqueeze(-1)) % b]  # (*b, m/b, n/b, b, b): C(w)_kl = w_(l−k)
        return blocks.movedim(-2, -3).reshape(w0.shape) / w0.shape[-1]

    def absolute(self, f: Factors, w0: Tensor) -> Tensor:
        # A Fourier transform mixes all of a block, and so its rounding.
        sizes = f.w.to(w0.dtype).abs().sum(-1, keepdim=True).expand(f.w.shape)
        return self.delta(f.instead(w=sizes), w0)

    def acts(self, linear: bool) -> bool:
        return linear

    def act(self, f: Factors, call: Call) -> Tensor:
        b, n = self.block_size, call.x.shape[-1]
        wide = torch.promote_types(call.x.dtype, torch.float32)
        x = torch.fft.rfft(call.x.to(wide).unflatten(-1, (-1, b)))  # (..., n/b, b/2 + 1)
        y = torch.einsum("...jk,ijk->...ik", x, torch.fft.rfft(f.w.to(wide)).conj())
        return call.placed(torch.fft.irfft(y, n=b).flatten(-2) / n).to(call.x.dtype)
