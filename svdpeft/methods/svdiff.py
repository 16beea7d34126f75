"""SVDiff: train a shift of the singular values, kept from crossing zero by a ReLU.

    W' = W0 + U (diag(ReLU(σ + s C)) − Σ) Vᵀ = U diag(ReLU(σ + s C)) Vᵀ        C = δ = 0 at the start

s is the strength: 1 in training, and free to be changed afterwards, ``adapter.set(strength=0.5)``.

L. Han, Y. Li, H. Zhang, P. Milanfar, D. Metaxas, F. Yang. SVDiff: Compact Parameter Space for Diffusion Fine-Tuning.
ICCV 2023, arXiv:2303.11305.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.methods.base import Factors, Given, Reference, Tensors
from svdpeft.methods.base.frozen_bases import FrozenBases
from svdpeft.registry import METHODS


@METHODS.register("svdiff")
@dataclass(frozen=True)
class SVDiff(FrozenBases):
    """Spectral shifts: min(m, n) values per weight, and a strength that can be turned after training.

    When to use:
        Personalising an image generator from a handful of pictures: files are tiny, shifts of several subjects can
        be combined, and the strength trades the new subject against what the model knew. A direction whose σ + s δ
        has fallen below zero is gone and gets no gradient any more, so large learning rates kill small directions.
        U and V are stored beside the weight, twice the size of a square one.

    Paper and code:
        There is no official code. The community's also shifts norms and biases, each as a spectrum of one value;
        not offered here, ``attach(..., train=...)`` trains them whole.

    Args:
        rank: number of leading singular values that train, or a mapping from site pattern to it; ``None`` is all,
            as published.
        driver: of the decomposition; at full rank always exact.
        strength: s at the start; any finite number, 0 is the base model.
    """

    rank: int | dict[str, int] | None = None
    strength: float = 1.0

    learning_rates: ClassVar = {"vision": 3e-2, "language": 2e-2}
    trains: ClassVar = ("C",)
    settable: ClassVar = ("strength",)
    latex: ClassVar[str] = r"W' = W_0 + U\,(\mathrm{diag}(\mathrm{ReLU}(\sigma + s\,\delta)) - \Sigma)\,V^\top"
    reference: ClassVar = Reference(
        key="han2023svdiff",
        authors="Han, Ligong and Li, Yinxiao and Zhang, Han and Milanfar, Peyman and Metaxas, Dimitris and Yang, Feng",
        title="SVDiff: Compact Parameter Space for Diffusion Fine-Tuning",
        year=2023,
        venue="IEEE/CVF International Conference on Computer Vision",
        arxiv="2303.11305",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.strength):
            raise ValueError(f"strength {self.strength} is not a finite number")

    def start(self, w: Tensor, given: Given) -> Tensors:
        tensors = self.bases(w, given)
        shift, strength = torch.zeros_like(tensors["sigma"]), w.new_full((1,), self.strength)
        return tensors | {"C": shift, "strength": strength}

    def change(self, f: Factors) -> Tensor:
        # ReLU(σ + s δ) − σ, without the sum where it is alive
        shift = f.strength * f.C
        return torch.where(f.sigma + shift > 0, shift, -f.sigma)
