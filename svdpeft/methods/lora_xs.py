"""LoRA-XS: train a small dense core between the frozen singular bases of the weight.

    W' = W0 + s L C A        L = U_r    A = Σ_r V_rᵀ    C ~ N(0, 10⁻¹⁰), r×r    s = α/r

K. Bałazy, M. Banaei, K. Aberer, J. Tabor. LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters.
arXiv:2405.17604.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.methods.base import Decomposed, Given, Reference, Scaled, Tensors, generator
from svdpeft.registry import METHODS


@METHODS.register("lora-xs")
@dataclass(frozen=True)
class LoRAXS(Decomposed, Scaled):
    """r² values per weight, whatever its size.

    When to use:
        Many adapters of one base, or a budget far below rank-1 LoRA: the bases follow from the base weight, and an
        adapter is r² numbers. All of the update lies between the leading singular vectors, so a task that lives
        outside of them is out of reach at any number of steps. The learning rate is large, 4e-3 in the paper's
        mathematics runs.

    Paper and code:
        The code decomposes by scikit-learn's TruncatedSVD (ten iterations, seed 42); here it is the library's own,
        which agrees up to signs and the accuracy of that sketch.
        The code can also take the trailing triplets or a random matrix's; not offered, MiCA starts from the former.

    Args:
        alpha: α of s = α/r; ``None`` is α = r, the paper's choice.
        std: of the normal distribution that C is drawn from. With 0 the start is the base model exactly, and it
            trains as well, since the gradient at C = 0 is Lᵀ G Aᵀ.

    Example:
        >>> LoRAXS(rank=64).count(1, 4096, 4096), LoRAXS(std=0.0).exact_start
        (4096, True)
    """

    rank: int | dict[str, int] | None = 64
    std: float = 1e-5

    learning_rates: ClassVar = {"vision": 1e-2, "language": 4e-3}
    trains: ClassVar = ("C",)
    anchored: ClassVar = False
    latex: ClassVar[str] = r"W' = W_0 + \tfrac{\alpha}{r}\,U_r\,C\,\Sigma_r V_r^\top"
    reference: ClassVar = Reference(
        key="balazy2024loraxs",
        authors="Bałazy, Klaudia and Banaei, Mohammadreza and Aberer, Karl and Tabor, Jacek",
        title="LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters",
        year=2024,
        arxiv="2405.17604",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.std < math.inf:
            raise ValueError(f"std {self.std} is outside [0, inf)")

    @property
    def draws(self) -> bool:  # type: ignore[override]
        return self.std > 0

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        return self.std == 0

    def start(self, w: Tensor, given: Given) -> Tensors:
        u, s, vh = self.svd(w, given)
        noise = torch.randn(*s.shape, self._rank, generator=generator(given.seed), dtype=torch.float64)
        return {"L": u, "C": (self.std * noise).to(w) + 0.0, "A": s.unsqueeze(-1) * vh}

    def count(self, batch: int, m: int, n: int) -> int:
        """r² per matrix."""
        return batch * self._rank**2
