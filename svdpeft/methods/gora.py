"""GoRA: LoRA whose ranks and start come from one look at the gradients.

    W' = W0 + s L A        A ~ N(0, 1/n)    s L₀ A = −η √(n/r) G A⁺A    s = α/√r
    I = mean |W0 ∘ G|    r = ⌊(I / ΣI) Σ r₀(m + n) / (m + n)⌋, within [least, most]        sums over all sites

G = ∂loss/∂W is the mean over a few batches. Nothing is subtracted: the start is the base model after a step against the
part of G that lies in the rows of A.

H. He, P. Ye, Y. Ren, Y. Yuan, L. Zhou, S. Ju, L. Chen. GoRA: Gradient-driven Adaptive Low Rank Adaptation.
NeurIPS 2025, arXiv:2502.12171.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.methods.base import Given, PerSite, Reference, Scaled, Tensors, generator
from svdpeft.registry import METHODS

DAMP = 1e-8  # added to A Aᵀ, as in the code


@METHODS.register("gora")
@dataclass(frozen=True)
class GoRA(Scaled):
    """LoRA that gives rank to the weights that gradients, weighed by the weights, ask it for.

    When to use:
        As LoRA-One, where weights deserve different ranks as well: a few batches of the data give both (32 in the
        published runs). The ranks are bounded on either side, so they add up to about what was asked for and not to the
        value. An adapter is a LoRA of the ranks found.

    Paper and code:
        In the paper L is against the gradient, so that the first loss falls; the code leaves the minus out where it
        starts. Here it is the paper's.
        The code also offers twelve other importances, the Frobenius norm by default; the paper's is here. Its variant
        that trains the base for some steps and puts it back is not offered.
        Its recipe trains L at 16 times the rate of A, 5e-5: here the rate is one for both unless the trainer has
        ``loraplus_ratio=16``.

    Args:
        rank: r₀, or a mapping from site pattern to r₀: what the ranks are for an average importance.
        alpha: α; the paper's is 16, ``None`` is α = r.
        rs: scale α/√r, the paper's, instead of α/r; r is the rank found.
        eta: η, the size of the step that the start takes.
        least: smallest rank of a site.
        most: largest rank of a site; no rank is larger than its matrix.

    Example:
        >>> model, data = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5)), [torch.randn(20, 6)]
        >>> seen = svdpeft.calibrate(model, data, gradients=True, loss=lambda out, batch: out.square().mean())
        >>> adapter = svdpeft.attach(model, GoRA(rank=2, least=1, most=4), calibration=seen)
        >>> all(1 <= site.method.rank <= 4 for site in adapter.sites.values())
        True
    """

    alpha: float | None = 16.0
    rs: bool = True
    eta: float = 0.05
    least: int = 4
    most: int = 32

    anchored: ClassVar[bool] = False
    exact_start: ClassVar[bool] = False
    draws: ClassVar = True
    needs: ClassVar = "gradients"
    learning_rates: ClassVar = {"vision": 3e-3, "language": 2e-4}
    latex: ClassVar[str] = (
        r"W' = W_0 + s\,L A,\quad s\,L_0 A_0 = -\eta\sqrt{n/r}\;G A_0^{+} A_0,\quad "
        r"r \propto \overline{|W_0 \circ G|} \,/\, (m + n)"
    )
    reference: ClassVar = Reference(
        key="he2025gora",
        authors="He, Haonan and Ye, Peng and Ren, Yuchen and Yuan, Yuan and Zhou, Luyang and Ju, Shucun and Chen, Lei",
        title="GoRA: Gradient-driven Adaptive Low Rank Adaptation",
        year=2025,
        venue="Advances in Neural Information Processing Systems",
        arxiv="2502.12171",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.least <= self.most:
            raise ValueError(f"least {self.least} and most {self.most}: the ranks are to be in between, at least 1")
        if not 0.0 <= self.eta < math.inf:
            raise ValueError(f"eta {self.eta} is outside [0, inf)")

    def resolve(self, sites: Sequence[Given], clip: bool) -> list[PerSite]:
        methods = [self.at(site.name, *site.shape[1:], clip=clip, roles=site.roles) for site in sites]
        if any(site.statistics is None for site in sites):  # a plan, before there is data
            return [*methods]
        importance = [float((site.weight() * _gradient(site)).abs().mean()) for site in sites]
        if not (whole := sum(importance)):
            raise ValueError("GoRA finds no ranks: every gradient of the calibration is zero, or every weight")
        budget = sum(method._rank * sum(site.shape[1:]) for method, site in zip(methods, sites, strict=True))
        ranks = []
        for site, share in zip(sites, importance, strict=True):
            rank = round(share / whole * budget) // sum(site.shape[1:])
            ranks.append(min(max(rank, self.least), self.most, *site.shape[1:]))
        return [replace(method, rank=rank) for method, rank in zip(methods, ranks, strict=True)]

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, _, n = w.shape
        a = torch.randn(*batch, self._rank, n, generator=generator(given.seed), dtype=torch.float64) / math.sqrt(n)
        a, gradient = a.to(w.device), _gradient(given).double()
        gram = a @ a.mT + DAMP * torch.eye(self._rank, dtype=a.dtype, device=a.device)
        step = torch.linalg.solve(gram, a @ gradient.mT).mT  # G Aᵀ (A Aᵀ)⁻¹
        return {"L": (-self.eta * math.sqrt(n / self._rank) / self.scale * step).to(w), "A": a.to(w)}


def _gradient(site: Given) -> Tensor:
    return site.seen("gradient", "GoRA").to(site.device)
