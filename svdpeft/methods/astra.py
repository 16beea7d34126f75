"""Astra: LoRA started in the directions of a layer's outputs that data hardly use.

    W' = W0 + s(L A − L₀A₀)        E[y yᵀ] = Q Λ Qᵀ, y = W0 x    L₀ = Q_−r    A₀ = Q_−rᵀ W0    s = α/r

Q_−r are the eigenvectors of the r smallest eigenvalues. W0 E[x xᵀ] W0ᵀ is E[y yᵀ], so the inputs of a layer are enough.

K. Liu, Y. Zhang, N. Cheng, Y. Zhu, Y. Wang, S. Wang, J. Xiao. Astra: Activation-Space Tail-Eigenvector Low-Rank
Adaptation of Large Language Models. arXiv:2602.19111.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdpeft.methods.base import Given, Reference, Scaled, Tensors
from svdpeft.methods.base.directions import trailing
from svdpeft.registry import METHODS


@METHODS.register("astra")
@dataclass(frozen=True)
class Astra(Scaled):
    """A split of the weight by what its outputs look like on data.

    When to use:
        Where what the base does on the calibration data should stay, and outputs that it hardly uses are free for the
        task (``end="tail"``, the paper). With ``end="head"`` the most used outputs train. One pass over a few hundred
        texts of the data, and an eigendecomposition of m×m per weight. Its recipe is PiSSA's: rank 128, 2e-5.

    Paper and code:
        The paper says tail; the code's default mode takes the largest eigenvalues by the order of its solver:
        ``end="head"``. The code looks at the first example of a batch alone and divides by its largest output; here the
        moments are exact. Its allocation of ranks by entropy is not offered: ``allocate`` of other methods is one.

    Args:
        alpha: α of s = α/r; ``None`` is α = r.
        end: which eigenvectors: ``"tail"``, of the smallest eigenvalues, or ``"head"``.

    Example:
        >>> model, data = nn.Sequential(nn.Linear(6, 4)), [torch.randn(20, 6)]
        >>> seen = svdpeft.calibrate(model, data)
        >>> svdpeft.attach(model, Astra(rank=2), calibration=seen).trainable_count
        20
    """

    end: Literal["tail", "head"] = "tail"

    needs: ClassVar = "inputs"
    learning_rates: ClassVar = {"vision": 1e-3, "language": 1e-4}
    latex: ClassVar[str] = (
        r"W' = W_0 + s\,(L A - L_0 A_0),\quad W_0\,\mathbb{E}[x x^\top]\,W_0^\top = Q \Lambda Q^\top,\quad "
        r"L_0 = Q_{-r},\quad A_0 = Q_{-r}^\top W_0"
    )
    reference: ClassVar = Reference(
        key="liu2026astra",
        authors="Liu, Kainan and Zhang, Yong and Cheng, Ning and Zhu, Yun and Wang, Yanmeng and Wang, Shaojun and "
        "Xiao, Jing",
        title="Astra: Activation-Space Tail-Eigenvector Low-Rank Adaptation of Large Language Models",
        year=2026,
        arxiv="2602.19111",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.end not in ("tail", "head"):
            raise ValueError(f"end {self.end!r} is neither 'tail' nor 'head'")

    def start(self, w: Tensor, given: Given) -> Tensors:
        second, wide = given.seen("second", "Astra").to(w.device, torch.float64), w.double()
        outputs = wide @ second @ wide.mT
        if self.end == "head":
            left = torch.linalg.eigh(outputs).eigenvectors[..., -self._rank :]
        else:
            left = trailing(outputs, self._rank, min(w.shape[-1], given.statistics.count if given.statistics else 0))
        return {"L": left.to(w), "A": (left.mT @ wide).to(w)}
