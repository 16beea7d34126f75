"""One adapter of several: the weighted sum of their updates, exact or of a rank, by TIES or DARE.

    sum     ΔW = Σᵢ wᵢ ΔWᵢ
    ties    τᵢ = wᵢ ΔWᵢ, of which the share ``density`` of the largest magnitudes stays; γ = sgn Σᵢ τᵢ;
            ΔW = the mean, entry by entry, of those τᵢ that are not zero and have the sign γ
    dare    ΔW = Σᵢ wᵢ Mᵢ ∘ ΔWᵢ / density, the entries of Mᵢ 1 with probability ``density`` and else 0

The sum of updates that are products is a product, [w₁L₁C₁ | w₂L₂C₂] [A₁ ; A₂], so that no m×n matrix is built. The
other two, and updates of full rank, are formed whole and then the nearest product of a rank is taken.

P. Yadav, D. Tam, L. Choshen, C. Raffel, M. Bansal. TIES-Merging: Resolving Interference When Merging Models. NeurIPS
2023, arXiv:2306.01708. L. Yu, B. Yu, H. Yu, F. Huang, Y. Li. Language Models are Super Mario: Absorbing Abilities from
Homologous Models as a Free Lunch. ICML 2024, arXiv:2311.03099.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.ambient import ordinary
from svdpeft.adapter.attach import install
from svdpeft.adapter.turns import turns
from svdpeft.decomposition import EXACT, Product, truncated
from svdpeft.methods.base import Factors, generator
from svdpeft.methods.lora import LoRA
from svdpeft.methods.whole import Whole
from svdpeft.registry import near_miss
from svdpeft.sites.place import Place, same_use
from svdpeft.sites.shards import write
from svdpeft.sites.site import Site
from svdpeft.targets.choice import Choice

How = Literal["sum", "ties", "dare"]
Weighted = Sequence[tuple[float, Site]]


@dataclass(frozen=True)
class Combined:
    """What ``combine`` has made.

    Args:
        adapter: a LoRA of scale one, attached and off; rows and weights that train whole stay so.
        lost: per site ‖ΔW − ΔW_r‖_F / ‖ΔW‖_F, what a rank that is too small leaves out; 0 up to rounding without one.
    """

    adapter: Adapter
    lost: Mapping[str, float]

    def __str__(self) -> str:
        if not self.lost:
            return str(self.adapter)
        where = max(self.lost, key=lambda name: self.lost[name])
        return f"{self.adapter}: at most {self.lost[where]:.2%} of an update is lost, at {where}"


@ordinary()
@torch.no_grad()
def combine(
    adapters: Sequence[tuple[Adapter, float]],
    rank: int | None = None,
    how: How = "sum",
    density: float = 0.2,
    name: str = "combined",
    seed: int = 0,
) -> Combined:
    """Make one adapter of several that are attached to one model. These stay as they are, and the new one is off.

    Args:
        adapters: each with its weight wᵢ, a finite number; in any state but detached. A site that only some have counts
            as an update of zero in the others.
        rank: of the new adapter at every site; ``None`` is the exact rank of each sum.
        how: ``"sum"``, ``"ties"`` or ``"dare"``, of the formulas above.
        density: of ties and dare: the share of the entries that stays, in (0, 1].
        name: of the new adapter.
        seed: of dare's draws; each site's depends on its name, too.

    Returns:
        The adapter, and what each site lost. Parameters that are trained whole become base + Σᵢ wᵢ (wholeᵢ − base).

    Raises:
        ValueError: adapters of several models, one twice, a weight that is not finite, a number out of range, running
            statistics that a training has changed, a name that is taken.

    Example:
        >>> model = nn.Linear(6, 4)
        >>> a, b = (svdpeft.attach(model, svdpeft.PiSSA(rank=1), name=name, seed=i) for i, name in enumerate("ab"))
        >>> made = svdpeft.combine([(a, 0.7), (b, 0.3)], rank=2)
        >>> with svdpeft.only(model, "combined"):
        ...     y = model(torch.zeros(2, 6))
        >>> made.adapter.state
        'disabled'
    """
    _check(adapters, rank, how, density)
    first = adapters[0][0]
    names = dict.fromkeys(site for adapter, _ in adapters for site in adapter.sites)
    found = {site: [(w, a.sites[site]) for a, w in adapters if site in a.sites] for site in names}
    for site, its in found.items():
        for _, other in its[1:]:
            if not same_use(its[0][1].places, other.places):
                raise ValueError(f"{site} is another use, or another view, of its weight in another of the adapters")
    built, lost = [], {}
    for site, its in found.items():
        one, draws = its[0][1], f"{seed}/{site}"
        method: LoRA | Whole
        if all(isinstance(each.method, Whole) for _, each in its):  # as parameters that are trained whole
            method, lost[site] = Whole(), 0.0
            factors = Factors(
                {"W": one.base_matrix() + _dense(its, how, density, draws)}, method.trains, shape=one.shape
            )
        else:
            product, tolerance = _update(its, how, density, draws)
            product, lost[site] = truncated(product, rank, tolerance)
            method = LoRA(rank=product.rank)
            factors = Factors({"L": product.L, "A": product.A}, method.trains, shape=one.shape)
        places = [Place(place.module, place.parameter, place.kind) for place in one.places]
        built.append((Choice(site, places, method, one.part), method, factors))
    whole = {n: place for adapter, _ in adapters for n, place in adapter.whole.items()}
    values = {n: _of_whole(n, adapters) for n in whole}
    pairs = [(choice.name, method) for choice, method, _ in built]
    with turns(first.model).change("combine()"):
        made = install(first.model, pairs, built, whole, {}, name, first.batch_norm)
        for tensor, value in made.own.holding(values):  # and nothing of an adapter that is on
            write(tensor, value)
        made.disable()
    return Combined(made, lost)


def _check(adapters: Sequence[tuple[Adapter, float]], rank: int | None, how: str, density: float) -> None:
    if not adapters:
        raise ValueError("combine() needs at least one adapter with its weight")
    if how not in get_args(How):
        raise ValueError(f"how={how!r}: {near_miss(how, get_args(How))}")
    if not 0 < density <= 1:
        raise ValueError(f"density {density} is outside (0, 1]")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank {rank!r} is not a whole number of at least 1")
    given = [adapter for adapter, _ in adapters]
    for adapter, weight in adapters:
        if not math.isfinite(weight):
            raise ValueError(f"the weight {weight} of adapter {adapter.name!r} is not finite")
        if adapter.state == "detached" or adapter.model is not given[0].model:
            raise ValueError(f"adapter {adapter.name!r} is not attached to the model of adapter {given[0].name!r}")
        if given.count(adapter) > 1:
            raise ValueError(f"adapter {adapter.name!r} is given twice: add its weights up")
        if changed := adapter.own.changed():
            raise ValueError(
                f"the training of adapter {adapter.name!r} has changed {next(iter(changed))}: running statistics have "
                "no sum; train with batch_norm='frozen'"
            )


def _update(its: Weighted, how: How, density: float, seed: str) -> tuple[Product, float | None]:
    """The update of one site, and which of its singular values are rounding: of float64 where factors are put side by
    side, of the matrices (``None``) where it is formed whole."""
    products = [(w, site.method.as_product(site.factors, site.base_matrix)) for w, site in its]
    parts = [(w * p.scale * p.cored(), p.A) for w, p in products if p is not None]
    if how == "sum" and len(parts) == len(its):
        left, right = torch.cat([left for left, _ in parts], -1), torch.cat([right for _, right in parts], -2)
        return Product(left, None, right).to(torch.promote_types(left.dtype, torch.float32)), EXACT
    return Product.of(_dense(its, how, density, seed)), None


def _dense(its: Weighted, how: How, density: float, seed: str) -> Tensor:
    """The update of one site, as matrices."""
    deltas = [w * site.matrix() for w, site in its]
    if how == "ties":
        return ties(deltas, density)
    if how == "dare":
        draws = generator(zlib.crc32(seed.encode()))
        deltas = [d * (torch.rand(d.shape, generator=draws) < density).to(d) / density for d in deltas]
    return torch.stack(deltas).sum(0)


def ties(deltas: Sequence[Tensor], density: float) -> Tensor:
    """Trim, elect a sign and take the mean of those that have it: the formula above.

    Args:
        deltas: the weighted updates τᵢ, of one shape.
        density: share of the entries of each that stays.

    Example:
        >>> ties([torch.tensor([3.0, 1.0, 2.0]), torch.tensor([-1.0, 3.0, 4.0])], density=2 / 3)
        tensor([3., 3., 3.])
    """
    trimmed = torch.stack([_largest(delta, density) for delta in deltas])
    agree = (trimmed != 0) & (trimmed.sign() == trimmed.sum(0).sign())
    return (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(delta: Tensor, density: float) -> Tensor:
    kept = torch.zeros_like(delta).flatten()
    index = delta.abs().flatten().topk(max(round(density * delta.numel()), 1)).indices
    kept[index] = delta.flatten()[index]
    return kept.view_as(delta)


def _of_whole(name: str, adapters: Sequence[tuple[Adapter, float]]) -> Tensor:
    its = [(w, adapter.own[name]) for adapter, w in adapters if name in adapter.whole]
    base = next(adapter.own.base(name) for adapter, _ in adapters if name in adapter.whole).to(its[0][1])
    return base + torch.stack([w * (value - base) for w, value in its]).sum(0)
