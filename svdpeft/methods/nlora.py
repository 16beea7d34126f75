"""NLoRA: start from the Nyström sketch of the weight, its first rows and columns.

    W' = W0 + s(L C A − L₀C₀A₀)        L₀ = W0[:, :r]    C₀ = W0[:r, :r]⁺    A₀ = W0[:r, :]    s = α/r

C. Guo, Y. Wu, Y. Chang. NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models. arXiv:2502.14482.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdpeft.methods.base import Given, Reference, Scaled, Tensors
from svdpeft.registry import METHODS

CUTOFF = 1e-3  # of the block's largest singular value: smaller ones are not inverted


@METHODS.register("nlora")
@dataclass(frozen=True)
class NLoRA(Scaled):
    """A start from the weight without a decomposition of it.

    When to use:
        Where a principal start is wanted and an SVD of every weight is too dear: only a block of r×r is decomposed. How
        well the sketch holds the weight depends on its first r rows and columns, which nobody has chosen.
        ``only="core"`` trains C alone, r² values per weight (IntTune).

    Paper and code:
        A Nyström sketch has the pseudo-inverse of the block between the two strips. The published code puts the block
        itself there, and subtracts nothing: ``sketch="block"`` has that start, subtracted.
        Singular values of the block below a thousandth of its largest are not inverted: the paper says nothing of an
        ill-conditioned one.

    Args:
        alpha: α of s = α/r; ``None`` is α = r.
        sketch: what C starts from: ``"inverse"`` or ``"block"``.
        only: ``"core"`` freezes both strips, ``None`` trains all three.

    Example:
        >>> NLoRA(rank=8).count(1, 30, 20), NLoRA(rank=8, only="core").count(1, 30, 20)
        (464, 64)
    """

    sketch: Literal["inverse", "block"] = "inverse"
    only: Literal["core"] | None = None

    learning_rates: ClassVar = {"vision": 1e-3, "language": 2e-4}
    latex: ClassVar[str] = (
        r"W' = W_0 + s\,(L\,C A - L_0 C_0 A_0),\quad L_0 = W_{:,:r},\quad C_0 = W_{:r,:r}^{+},\quad A_0 = W_{:r,:}"
    )
    reference: ClassVar = Reference(
        key="guo2025nlora",
        authors="Guo, Chenlu and Wu, Yuan and Chang, Yi",
        title="NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models",
        year=2025,
        arxiv="2502.14482",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sketch not in ("inverse", "block"):
            raise ValueError(f"sketch {self.sketch!r} is neither 'inverse' nor 'block'")
        if self.only not in ("core", None):
            raise ValueError(f"only {self.only!r} is neither 'core' nor None")

    @property
    def trains(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("C",) if self.only == "core" else ("L", "C", "A")

    def start(self, w: Tensor, given: Given) -> Tensors:
        r = self._rank
        block = w[..., :r, :r]
        core = torch.linalg.pinv(block.double(), rtol=CUTOFF).to(w) if self.sketch == "inverse" else block
        return {"L": w[..., :r].clone(), "C": core.clone(), "A": w[..., :r, :].clone()}

    def count(self, batch: int, m: int, n: int) -> int:
        """r (m + n + r) per matrix, or r²."""
        return batch * self._rank * (self._rank + (0 if self.only == "core" else m + n))
