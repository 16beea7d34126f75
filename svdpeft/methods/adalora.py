"""AdaLoRA: a random diagonal update whose triplets share one budget over the whole model.

    W' = W0 + s L diag(C) A        L, A ~ N(0, 0.02²)    C = 0    s = α/r
    penalty  γ Σ_sites (‖LᵀL − I‖_F² + ‖AAᵀ − I‖_F²)        after each step:  C_i ← 0 of the triplets over budget

L, C, A are the paper's P, Λ, Q. The budget, its schedule and the importance of a triplet: ``methods.base.allocation``.

Q. Zhang, M. Chen, A. Bukharin, N. Karampatziakis, P. He, Y. Cheng, W. Chen, T. Zhao.
Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning. ICLR 2023, arXiv:2303.10512.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdpeft.methods.base import Factors, Given, Reference, Tensors, Triplets, generator
from svdpeft.methods.base.allocation import Budget
from svdpeft.methods.base.bases import errors
from svdpeft.registry import METHODS

DEVIATION = 0.02  # of the entries of L and A at the start
STABILISER = 1e-5  # what the code adds to the rank


@METHODS.register("adalora")
@dataclass(frozen=True)
class AdaLoRA(Triplets):
    """LoRA in the form of an SVD that gives its rank to the layers that need it most.

    When to use:
        When it is not known which layers deserve rank and a trained adapter may differ in rank from layer to layer.
        It trains ``rank`` triplets everywhere, half as many again as it keeps, holds two more copies of what it trains
        while it chooses, and needs the number of steps beforehand. In short trainings there is little to choose from.
        The trainer or the callback drives it; a loop of your own must call ``before_step`` and ``after_step``.

    Paper and code:
        The paper's penalty is the sum of squared norms; the code takes the mean of the norms over all L and A, not
        squared: ``regulariser="code"``.
        The paper scales by α/r; the code by α/(r + 1e-5): ``scaling="code"``. In both r stays the rank at the start.
        The paper multiplies weight and gradient of one step; the code takes the weight after the optimizer's step:
        ``allocate=Budget(importance="code")``.
        At equal importance the code drops every triplet at the threshold; here the first keep their place and the
        budget is met exactly. The code fails where target and start are equal, and here nothing is dropped.
        γ is 0.1 in most of the official scripts and 0.5 in PEFT.

    Args:
        rank: r at the start, or a mapping from site pattern to r.
        allocate: the budget; the default keeps two thirds of the triplets, 8 of 12. ``None``: all stay.
        gamma: γ, weight of the penalty.
        regulariser: ``"paper"`` or ``"code"``.
        scaling: ``"paper"`` or ``"code"``.

    Example:
        >>> AdaLoRA(rank=12, allocate=Budget(target_rank=8, t_initial=100, t_final=300, interval=10)).trains
        ('L', 'C', 'A')
    """

    rank: int | Mapping[str, int] | None = 12
    allocate: Budget | None = field(default=Budget())
    gamma: float = 0.1
    regulariser: Literal["paper", "code"] = "paper"
    scaling: Literal["paper", "code"] = "paper"

    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    trains: ClassVar = ("L", "C", "A")
    pruned: ClassVar = ("C",)
    anchored: ClassVar[bool] = False
    draws: ClassVar = True
    latex: ClassVar[str] = r"W' = W_0 + s\,L\,\mathrm{diag}(C)\,A,\qquad C_0 = 0,\quad L_0, A_0 \sim N(0,\, 0.02^2)"
    reference: ClassVar = Reference(
        key="zhang2023adalora",
        authors="Zhang, Qingru and Chen, Minshuo and Bukharin, Alexander and Karampatziakis, Nikos and He, Pengcheng "
        "and Cheng, Yu and Chen, Weizhu and Zhao, Tuo",
        title="Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
        year=2023,
        venue="International Conference on Learning Representations",
        arxiv="2303.10512",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma < 0:
            raise ValueError(f"gamma {self.gamma} is negative")
        for name in ("regulariser", "scaling"):
            if getattr(self, name) not in ("paper", "code"):
                raise ValueError(f"{name} {getattr(self, name)!r} is neither 'paper' nor 'code'")

    @property
    def scale(self) -> float:
        rank = self._rank + (STABILISER if self.scaling == "code" else 0)
        return (self._rank if self.alpha is None else self.alpha) / (math.sqrt(rank) if self.rs else rank)

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        source = generator(given.seed)
        left, right = (
            (DEVIATION * torch.randn(*batch, *shape, generator=source, dtype=torch.float64)).to(w)
            for shape in ((m, self._rank), (self._rank, n))
        )
        return {"L": left, "C": w.new_zeros(*batch, self._rank), "A": right}

    def penalty(self, sites: Sequence[Factors]) -> Tensor | None:
        if self.gamma == 0:
            return None
        if self.regulariser == "paper":
            return self.gamma * errors(sites, "squared").sum()
        return self.gamma * errors(sites).mean()
