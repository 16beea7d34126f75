"""EVA: LoRA whose A starts at the directions in which the inputs vary most, with more rank where they explain more.

    W' = W0 + s L A        L = 0    A = V_rᵀ    X = U Σ Vᵀ of the inputs X, one row per position

The ranks of all sites are chosen together: of all right-singular vectors those with the largest share σ² / Σσ² of their
own layer's sum, as many as the ranks given add up to, and at most ρ r at one site. The scale s stays.

F. Paischer, L. Hauzenberger, T. Schmied, B. Alkin, M. P. Deisenroth, S. Hochreiter.
Parameter Efficient Fine-tuning via Explained Variance Adaptation. NeurIPS 2025, arXiv:2410.07170.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.decomposition import canonical_signs
from svdpeft.methods.base import Given, PerSite, Reference, Scaled, Tensors
from svdpeft.registry import METHODS


@METHODS.register("eva")
@dataclass(frozen=True)
class EVA(Scaled):
    """LoRA with a start and with ranks from a calibration pass.

    When to use:
        As LoRA, where data of the new task is at hand: the first gradients are as large as they can be, and the ranks
        go where the inputs need them. Needs ``svdpeft.calibrate`` and two eigendecompositions per site. The
        ranks together are what was asked for; the trained values are not, where shapes differ. A rank beyond the number
        of inputs is an error: what else a solver finds is rounding. Not for weights that are read and never called.

    Paper and code:
        The paper decomposes the inputs as they are. PEFT, the authors' own code, subtracts their mean:
        ``centred=True``.
        PEFT divides A by √σ on request: ``whiten=True``.
        PEFT adds batches until directions turn less than τ; here every batch given counts, exactly.
        PEFT takes the adapter off a site that is left without rank; here every site keeps at least one.
        PEFT leaves out positions without a label: ``svdpeft.calibrate(..., mask=…)``.

    Args:
        rank: r, or a mapping from site pattern to r: what the ranks are on average.
        alpha: α of the rank given; ``None`` is α = r. Sites whose rank changes get another α and the same scale.
        rho: ρ, at least 1; 1 leaves the ranks as they are.
        centred: subtract the mean of the inputs.
        whiten: divide A by √σ.

    Example:
        >>> model, data = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5)), [torch.randn(20, 6)]
        >>> adapter = svdpeft.attach(model, EVA(rank=2), calibration=svdpeft.calibrate(model, data))
        >>> sum(site.method.rank for site in adapter.sites.values())
        4
    """

    rho: float = 2.0
    centred: bool = False
    whiten: bool = False

    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    needs: ClassVar = "inputs"
    anchored: ClassVar[bool] = False
    latex: ClassVar[str] = r"W' = W_0 + s\,L A,\quad L_0 = 0,\quad A_0 = V_r^\top,\quad X = U \Sigma V^\top"
    reference: ClassVar = Reference(
        key="paischer2025eva",
        authors="Paischer, Fabian and Hauzenberger, Lukas and Schmied, Thomas and Alkin, Benedikt and Deisenroth, "
        "Marc Peter and Hochreiter, Sepp",
        title="Parameter Efficient Fine-tuning via Explained Variance Adaptation",
        year=2025,
        venue="Advances in Neural Information Processing Systems",
        arxiv="2410.07170",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho < 1:
            raise ValueError(f"rho {self.rho} is less than 1: a site could not even keep its own rank")

    def _scatter(self, given: Given) -> Tensor:
        """XᵀX, (*b, n, n), float64; of X less its mean where the method is centred."""
        second = given.seen("second", "EVA").to(given.device, torch.float64)
        if not self.centred:
            return second
        assert given.statistics is not None
        total = given.seen("total", "EVA").to(second)
        return second - total.unsqueeze(-1) * total.unsqueeze(-2) / given.statistics.count

    def resolve(self, sites: Sequence[Given], clip: bool) -> list[PerSite]:
        methods = [self.at(site.name, *site.shape[1:], clip=clip, roles=site.roles) for site in sites]
        if self.rho == 1 or any(site.statistics is None for site in sites):  # a plan, before there is data
            return [*methods]
        ranks = dict.fromkeys((site.name for site in sites), 1)
        rest = []
        for site, method in zip(sites, methods, strict=True):
            cap = min(round(self.rho * method._rank), *site.shape[1:])
            values = torch.linalg.eigvalsh(self._scatter(site)).clamp(min=0).flip(-1)  # (*b, n), σ²
            share = values.reshape(-1, values.shape[-1]).sum(0) / values.sum().clamp(min=1e-300)
            rest += [(-float(share[i]), site.name) for i in range(1, cap)]
        budget = sum(method._rank for method in methods) - len(sites)
        for _, name in sorted(rest)[:budget]:  # equal shares by name, so that the order of modules does not matter
            ranks[name] += 1
        return [_with_rank(method, ranks[site.name]) for site, method in zip(sites, methods, strict=True)]

    def start(self, w: Tensor, given: Given) -> Tensors:
        scatter = self._scatter(given)
        known = (given.statistics.count if given.statistics else 0) - self.centred
        if self._rank > known:
            raise ValueError(
                f"EVA of rank {self._rank} starts from directions of the inputs of {given.name}, of which there are "
                f"{known + self.centred}: calibrate with more, or take a rank of at most {max(known, 1)} there"
            )
        values, vectors = torch.linalg.eigh(scatter)
        a = vectors[..., -self._rank :].flip(-1).mT  # (*b, r, n), the largest first
        a = canonical_signs(a.mT, a)[1]
        if self.whiten:
            sigma = values[..., -self._rank :].flip(-1).clamp(min=0).sqrt()
            a = a / torch.where(sigma > 0, sigma, 1.0).sqrt().unsqueeze(-1)
        return {"L": w.new_zeros(*w.shape[:-1], self._rank), "A": a.to(w).contiguous()}


def _with_rank(method: EVA, rank: int) -> EVA:
    """The same scale at another rank."""
    if method.alpha is None and not method.rs:
        return replace(method, rank=rank)
    return replace(method, rank=rank, alpha=method.scale * (math.sqrt(rank) if method.rs else rank))
