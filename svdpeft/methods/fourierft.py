"""FourierFT: learn a few coefficients of the update's discrete Fourier transform.

    W' = W0 + α Re F⁻¹(S)        S = c at n_f entries that are drawn once, 0 elsewhere    c = 0

F⁻¹ is the inverse two-dimensional transform, which divides by m n. The entries are the same in all layers of a shape.
On a linear layer F⁻¹ is applied to the input along n, and along m to what comes of it, so that ΔW is not built.

Z. Gao, Q. Wang, A. Chen, Z. Liu, B. Wu, L. Chen, J. Li.
Parameter-Efficient Fine-Tuning with Discrete Fourier Transform. ICML 2024, arXiv:2405.03003.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.methods.base import Call, Factors, Given, Reference, Tensors, generator
from svdpeft.methods.base.spectrum import Spectrum
from svdpeft.registry import METHODS


@METHODS.register("fourierft")
@dataclass(frozen=True)
class FourierFT(Spectrum):
    """A dense update from a sparse spectrum: n_f values per layer, whatever its size.

    When to use:
        Where an adapter must be far smaller than a LoRA of rank 1 and still reach every entry of a weight. Not on a
        device without Fourier transforms; they are computed in float32 at least. No useful LoRA holds the result.

    Paper and code:
        Paper and published code start with c ~ N(0, 1), off the base model: reference_init=True. PEFT starts at zero,
            the default here.
        α is 300 in the published layer, and 150 in PEFT. It is divided by m n, so that it means something else at every
            size of a layer; the published layer is a square one.
        PEFT's entries are those of its seed, 777, for every adapter; here those of the seed of the adapter.

    Args:
        reference_init: start as the published code does.

    Example:
        >>> FourierFT(frequencies=1000).count(1, 4096, 4096)
        1000
    """

    frequencies: int = 1000
    alpha: float = 300.0
    reference_init: bool = False

    learning_rates: ClassVar = {"vision": 1e-1, "language": 5e-2}
    latex: ClassVar[str] = r"W' = W_0 + \alpha\, \mathrm{Re}\, \mathcal{F}^{-1}(S),\quad S_{E} = c"
    reference: ClassVar = Reference(
        key="gao2024fourierft",
        authors="Gao, Ziqi and Wang, Qichao and Chen, Aochuan and Liu, Zijing and Wu, Bingzhe and Chen, Liang and "
        "Li, Jia",
        title="Parameter-Efficient Fine-Tuning with Discrete Fourier Transform",
        year=2024,
        venue="International Conference on Machine Learning",
        arxiv="2405.03003",
    )

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        return not self.reference_init

    def start(self, w: Tensor, given: Given) -> Tensors:
        if self.reference_init:
            shape = (*w.shape[:-2], self.frequencies)
            return {"c": torch.randn(shape, generator=generator(given.seed), dtype=torch.float64).to(w)}
        return super().start(w, given)

    def delta(self, f: Factors, w0: Tensor) -> Tensor:
        return self.alpha * torch.fft.ifft2(self.spread(f.c.to(w0.dtype), f, *w0.shape[-2:])).real

    def absolute(self, f: Factors, w0: Tensor) -> Tensor:
        total = f.c.to(w0.dtype).abs().sum(-1)[..., None, None]  # every entry is a sum of all c
        return (abs(self.alpha) / (w0.shape[-2] * w0.shape[-1]) * total).expand_as(w0)

    def act(self, f: Factors, call: Call) -> Tensor:
        _, m, n = f.shape
        wide = torch.promote_types(call.x.dtype, torch.float32)
        seen = torch.fft.ifft(call.x.to(wide))[..., f.index % n] * f.c.to(wide)  # (..., n_f)
        spectrum = seen.new_zeros(*seen.shape[:-1], m).index_add(-1, f.index // n, seen)
        return call.placed(self.alpha * torch.fft.ifft(spectrum).real).to(call.x.dtype)
