"""LoRA-Null: train the part of the weight that the inputs of the old task hardly reach.

    W' = W0 + s(L A − L₀A₀)        W0 N Nᵀ = U Σ Vᵀ    L₀ = U √Σ    A₀ = √Σ Vᵀ    N (n, r) last eigenvectors of Σ x xᵀ

``version="v2"`` freezes A, so that for ever the update acts on these directions alone.

P. Tang, X. Hu, Y. Liu, L. Ding, D. Zhang, X. Wu, D. Zhang.
Put the Space of LoRA Initialization to the Extreme to Preserve Pre-trained Knowledge. AAAI 2026, arXiv:2503.02659
(first called LoRA-Null: Low-Rank Adaptation via Null Space for Large Language Models).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdpeft.decomposition import SVD
from svdpeft.methods.base import Decomposed, Given, Reference, Scaled, Tensors
from svdpeft.methods.base.directions import trailing
from svdpeft.registry import METHODS


@METHODS.register("lora-null")
@dataclass(frozen=True)
class LoRANull(Decomposed, Scaled):
    """PiSSA on the weight's projection to where the calibration data is not.

    When to use:
        Where the model must keep what it knows: calibrate on data of that, then train on the new task. "v2" keeps more
        and learns less, with half the trained values. Calibrate with more positions than a layer has inputs: with fewer
        the null space is larger than r, and r directions of it are taken that no data has chosen. Needs
        ``svdpeft.calibrate`` and an eigendecomposition per site. Not for weights that are read and never called.

    Paper and code:
        The code normalises each sample's inputs by their largest entry before it adds them up, as CorDA's does: not
        offered.

    Args:
        version: "v1" trains both factors, "v2" L alone.

    Example:
        >>> model, data = nn.Sequential(nn.Linear(6, 4)), [torch.randn(20, 6)]
        >>> seen = svdpeft.calibrate(model, data)
        >>> svdpeft.attach(model, LoRANull(rank=2, version="v2"), calibration=seen).trainable_count
        8
    """

    version: Literal["v1", "v2"] = "v1"

    learning_rates: ClassVar = {"vision": 3e-3, "language": 2e-4}
    needs: ClassVar = "inputs"
    latex: ClassVar[str] = (
        r"W' = W_0 + s\,(L A - L_0 A_0),\quad W_0 N N^\top = U \Sigma V^\top,\quad L_0 = U\sqrt{\Sigma},\quad "
        r"A_0 = \sqrt{\Sigma}\,V^\top"
    )
    reference: ClassVar = Reference(
        key="tang2026loranull",
        authors="Tang, Pengwei and Hu, Xiaolin and Liu, Yong and Ding, Lizhong and Zhang, Dongjie and Wu, Xing and "
        "Zhang, Debing",
        title="Put the Space of LoRA Initialization to the Extreme to Preserve Pre-trained Knowledge",
        year=2026,
        venue="Proceedings of the AAAI Conference on Artificial Intelligence",
        arxiv="2503.02659",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version not in ("v1", "v2"):
            raise ValueError(f"version {self.version!r} is neither 'v1' nor 'v2'")

    @property
    def trains(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("L", "A") if self.version == "v1" else ("L",)

    def start(self, w: Tensor, given: Given) -> Tensors:
        second = given.seen("second", "LoRANull").to(w.device, torch.float64)
        null = trailing(second, self._rank, given.statistics.count if given.statistics else 0)  # (*b, n, r)
        u, s, vh = self.svd(w.double() @ null, given)  # of a thin matrix; W0 N Nᵀ has the same u and s
        left, right = SVD(u, s, vh @ null.mT).balanced()
        return {"L": left.to(w), "A": right.to(w)}
