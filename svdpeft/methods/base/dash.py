"""A second stage of a training: directions of the weight, chosen by how far it has changed, train on by themselves.

    W' = W0 + ΔW + t U_k diag(δ) V_kᵀ        δ = 0 until the choice        rate_i = |u_iᵀ ΔW v_i| / σ_i

ΔW is the method's own change. After the warm-up U_k and V_k are the k triplets of W0 of the largest rates, and stay
these; until then they are the leading ones, and their δ is held at zero. Steps are those of the optimizer.

C. Si, Z. Shi, S. Zhang, X. Yang, H. Pfister, W. Shen.
Unleashing the Power of Task-Specific Directions in Parameter Efficient Fine-tuning. ICLR 2025, arXiv:2409.01035.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from svdpeft.decomposition import Product, difference
from svdpeft.methods.base.factored import Decomposed, Scaled
from svdpeft.methods.base.factors import Factors, Tensors
from svdpeft.methods.base.progress import Progress


@dataclass(frozen=True)
class Dash(Decomposed, Scaled):
    """Abstract: a scaled method with a second stage; it must say ``start``, with what ``choice`` returns among it.

    Args:
        directions: k; of a small weight at most all that there are; 0 leaves the second stage out.
        warmup: optimizer steps before the choice, at least 1.
    """

    directions: int = 8
    warmup: int = 100

    resolved: ClassVar = ("rank", "alpha", "directions")
    first: ClassVar[tuple[str, ...]] = ("L", "A")  # what trains in both stages

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("directions", 0), ("warmup", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} is below {least}")

    @property
    def trains(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.first, "delta") if self.directions else self.first

    @property
    def strength(self) -> float:
        """t, the factor in front of the second stage."""
        return 1.0

    def choosable(self, m: int, n: int) -> int:
        """How many of the leading triplets can be chosen."""
        return min(m, n)

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()):
        here = super().at(site, m, n, clip, roles)
        return dataclasses.replace(here, directions=min(self.directions, here.choosable(m, n)))

    def choice(self, u: Float[Tensor, "*b m q"], s: Float[Tensor, "*b q"], vh: Float[Tensor, "*b q n"]) -> Tensors:
        """What the second stage keeps of the triplets that can be chosen, largest first: the first are, so far."""
        if not self.directions:
            return {}
        index = torch.arange(self.directions, device=s.device).expand(*s.shape[:-1], -1)
        delta = s.new_zeros(*s.shape[:-1], self.directions)
        chosen = torch.zeros(1, dtype=torch.int64, device=s.device)
        return {"U": u, "sigma": s, "V": vh, "delta": delta, "index": index.clone(), "chosen": chosen}

    # -- the weight -----------------------------------------------------------------------------------------------

    def now(self, f: Factors) -> Product:
        return self._with_choice(super().now(f), f)

    def update(self, f: Factors) -> Product:
        return self._with_choice(self._own(f), f)

    def _own(self, f: Factors) -> Product:
        """ΔW of the first stage."""
        anchor = self.anchor(f)
        return super().now(f) if anchor is None else difference(super().now(f), anchor)

    def _with_choice(self, own: Product, f: Factors) -> Product:
        if not self.directions:
            return own
        columns = f.index.unsqueeze(-2).expand(*f.U.shape[:-1], -1)
        left = f.U.gather(-1, columns) * (f.delta * self.strength).unsqueeze(-2)
        right = f.V.gather(-2, f.index.unsqueeze(-1).expand(*f.index.shape, f.V.shape[-1]))
        return Product(torch.cat([own.cored() * own.scale, left], -1), None, torch.cat([own.A, right], -2))

    def count(self, batch: int, m: int, n: int) -> int:
        """What trains in the first stage, and k per matrix."""
        raise NotImplementedError

    def export_rank(self, m: int, n: int) -> int:
        own = super().export_rank(m, n)
        assert own is not None
        return min(own + self.directions, m, n)

    # -- steps ----------------------------------------------------------------------------------------------------

    @property
    def has_step(self) -> bool:
        return self.directions > 0

    @property
    def changes_gradients(self) -> bool:
        return self.directions > 0

    @property
    def keeps_state(self) -> bool:  # the number of the step
        return self.directions > 0

    @torch.no_grad()
    def before_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        if progress.step == 1 and progress.total is not None and progress.total <= self.warmup:
            raise ValueError(
                f"{type(self).__name__} chooses its directions after {self.warmup} steps, and this training has "
                f"{progress.total}: set warmup below that, or directions=0"
            )
        for f in sites:
            if "delta" in f.trains and f.delta.grad is not None:
                f.delta.grad.mul_(f.chosen)  # an optimizer leaves it, and its averages, at zero

    @torch.no_grad()
    def after_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        for f in sites if progress.step == self.warmup else ():
            if "delta" not in f.trains:
                continue
            own = self._own(f)
            along = (f.U.mT @ own.cored() * own.scale * (own.A @ f.V.mT).mT).sum(-1)  # u_iᵀ ΔW v_i, (*b, q)
            known = f.sigma > max(f.shape[1:]) * torch.finfo(f.sigma.dtype).eps * f.sigma[..., :1]
            rate = torch.where(known, along.abs() / torch.where(known, f.sigma, 1.0), -1.0)  # no kernel's vectors
            best = rate.argsort(dim=-1, descending=True, stable=True)[..., : f.index.shape[-1]]
            f.index.copy_(torch.where(f.chosen > 0, f.index, best))
            f.chosen.fill_(1)
