"""WaveFT: learn a few coefficients of the update's wavelet transform, patches of 2×2 entries each.

    W' = W0 + α IDWT(S)        S = c at n_f entries that are drawn once, 0 elsewhere    c = 0

IDWT is one level of Haar's transform. S is cut into quarters of equal size, and the entry (i, j) of a quarter is a
patch at rows 2i, 2i + 1 and columns 2j, 2j + 1 of the update, ½ with a pattern of signs: + everywhere (above, left),
the lower row − (above, right), the right column − (below, left), the diagonal + and the rest − (below, right). A side
of odd length is one longer in S, and its last row or column of patches is cut. The entries are the same in all layers
of a shape. On a linear layer sums and differences of neighbouring inputs are made into those of neighbouring outputs,
and ΔW is not built.

A. Bilican, M. A. Yılmaz, A. M. Tekalp, R. G. Cinbiş.
Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets. arXiv:2505.12532.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from svdpeft.methods.base import Call, Factors, Reference
from svdpeft.methods.base.spectrum import Spectrum
from svdpeft.registry import METHODS


@METHODS.register("waveft")
@dataclass(frozen=True)
class WaveFT(Spectrum):
    """A sparse update of small patches: n_f values per layer, whatever its size.

    When to use:
        Where an adapter must be smaller than a LoRA of rank 1, as FourierFT, without its dense update: each value moves
        four entries. The paper shows it for personalised diffusion models. ``SHiRA`` moves single entries; no LoRA file
        can hold either.

    Paper and code:
        PEFT's ``use_idwt=False`` puts c itself into W0, times 25: that is ``SHiRA`` with a larger learning rate.
        PEFT has longer wavelets, whose coefficients at the edges are lost in part, and a share of the coefficients by
        the size of a layer; neither is offered.
        PEFT's entries are those of its seed, 777, for every adapter; here those of the seed of the adapter.

    Args:
        alpha: α, PEFT's ``scaling``.

    Example:
        >>> WaveFT(frequencies=1000).count(1, 4096, 4096)
        1000
    """

    frequencies: int = 2592
    alpha: float = 25.0

    learning_rates: ClassVar = {"vision": 1e-3, "language": 1e-4}
    latex: ClassVar[str] = r"W' = W_0 + \alpha\, \mathrm{IDWT}(S),\quad S_{E} = c"
    reference: ClassVar = Reference(
        key="bilican2025waveft",
        authors="Bilican, Ahmet and Yılmaz, M. Akın and Tekalp, A. Murat and Cinbiş, R. Gökberk",
        title="Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets",
        year=2025,
        arxiv="2505.12532",
    )

    def delta(self, f: Factors, w0: Tensor) -> Tensor:
        s = self._quarters(f.c.to(w0.dtype), f, *w0.shape[-2:])
        left, right = _both(*s.unbind(-2)).movedim(-1, -2).unbind(-4)  # (i, row of the patch, j)
        patches = _both(left, right).flatten(-4, -3).flatten(-2)
        return self.alpha / 2 * patches[..., : w0.shape[-2], : w0.shape[-1]]

    def absolute(self, f: Factors, w0: Tensor) -> Tensor:
        s = self._quarters(f.c.to(w0.dtype).abs(), f, *w0.shape[-2:]).sum((-2, -4))
        patches = s.repeat_interleave(2, -1).repeat_interleave(2, -2)
        return abs(self.alpha) / 2 * patches[..., : w0.shape[-2], : w0.shape[-1]]

    def act(self, f: Factors, call: Call) -> Tensor:
        _, m, n = f.shape
        rows, columns = (m + 1) // 2, (n + 1) // 2
        (below, i), (right, j) = (
            (at // half, at % half) for at, half in ((f.index // n, rows), (f.index % n, columns))
        )
        pairs = F.pad(call.x, (0, n % 2)).unflatten(-1, (-1, 2))
        seen = _both(*pairs.unbind(-1)).movedim(-1, -2).flatten(-2)  # sums, and then differences
        seen = seen[..., below * columns + j] * f.c.to(call.x.dtype)  # (..., n_f)
        made = seen.new_zeros(*seen.shape[:-1], 2 * rows).index_add(-1, right * rows + i, seen)
        y = _both(*made.unflatten(-1, (2, -1)).unbind(-2)).flatten(-2)[..., :m]
        return call.placed(self.alpha / 2 * y)

    def _quarters(self, c: Tensor, f: Factors, m: int, n: int) -> Tensor:
        """S as (*b, 2, i, 2, j): whether below, and whether on the right."""
        s = F.pad(self.spread(c, f, m, n), (0, n % 2, 0, m % 2))
        return s.unflatten(-1, (2, -1)).unflatten(-3, (2, -1))


def _both(a: Tensor, b: Tensor) -> Tensor:
    """Sum and difference, side by side in a last axis."""
    return torch.stack([a + b, a - b], -1)
