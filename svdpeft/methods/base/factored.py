"""The methods on the one equation, and the hyper-parameters that many of them have.

W' = W0 + s([L C A]now − [L C A]start)        L (*b, m, r)    C (r, r) structured    A (*b, r, n)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from svdpeft.decomposition import SVD, Band, Driver, Product, check_rank, difference, truncated_svd
from svdpeft.methods.base.allocation import Budget
from svdpeft.methods.base.factors import Factors
from svdpeft.methods.base.given import Given
from svdpeft.methods.base.persite import PerSite
from svdpeft.methods.base.progress import Progress
from svdpeft.patterns import chosen

SIZES = {"L": lambda m, n: m, "C": lambda m, n: 1, "A": lambda m, n: n}  # numbers of a factor per rank


@dataclass(frozen=True)
class Factored(PerSite):
    """Abstract: a method whose update is a product of factors, W' = W0 + s([L C A]now − [L C A]start).

    It must say ``start``; ``trains`` and ``anchored`` say the rest of most methods. Where C is more than stored
    numbers, ``core`` makes it; where the update is no difference of two products, ``now``, ``anchor`` and ``update``
    say so.

    Example:
        >>> from dataclasses import dataclass
        >>> from svdpeft.methods.base import Factored
        >>> @dataclass(frozen=True)
        ... class Leading(Factored):
        ...     def start(self, w, given):
        ...         u, s, vh = torch.linalg.svd(w, full_matrices=False)
        ...         return {"L": u[..., : self.rank] * s[..., None, : self.rank], "A": vh[..., : self.rank, :]}
        >>> Leading(rank=2).at("fc", 6, 4).count(1, 6, 4)
        20

    Args:
        rank: r, the number of columns of L, or a mapping from site pattern to r (the first that matches wins).
    """

    rank: int | Mapping[str, int] | None = 8

    anchored: ClassVar[bool] = True  # the start LCA is subtracted; False where it is zero
    resolved: ClassVar = ("rank",)

    def core(self, f: Factors) -> Float[Tensor, "*b r"] | Float[Tensor, "*b r r"] | Band | None:
        """Return C as an operator: ``None``, a diagonal (*b, r), a matrix (*b, r, r) or a band of it."""
        return f.C if "C" in f._parameters else None

    def default_rank(self, m: int, n: int) -> int:
        """What ``rank=None`` means."""
        return min(m, n)

    def rank_limit(self, m: int, n: int) -> int | None:
        """The largest rank; ``None``: any."""
        return min(m, n)

    def export_rank(self, m: int, n: int) -> int | None:
        return min((2 if self.anchored and {"L", "A"} <= set(self.trains) else 1) * self._rank, m, n)

    def count(self, batch: int, m: int, n: int) -> int:
        """Of L, A and a diagonal C, those that train; a method with other tensors counts itself."""
        return batch * self._rank * sum(SIZES[name](m, n) for name in self.trains)

    # -- what follows from it -------------------------------------------------------------------------------------

    @property
    def scale(self) -> float:
        """s, the factor in front of L C A."""
        return 1.0

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()):
        rank = chosen(self.rank, site, roles)
        if rank is None:
            rank = self.default_rank(m, n)
        limit = self.rank_limit(m, n)
        if clip and limit is not None and isinstance(rank, int):
            rank = min(rank, limit)
        return dataclasses.replace(self, rank=check_rank(rank, m, n, site, math.inf if limit is None else limit))

    def factors(self, given: Given) -> Factors:
        """Build the site's factors, with the start values of those that train if the method is anchored."""
        tensors = self.start(given.weight(), given)
        if self.anchored:
            tensors |= {f"{name}0": tensors[name].clone() for name in "LCA" if name in self.trains}
        return Factors(tensors, self.trains, given.shared, given.shape)

    def tensor_names(self) -> list[str]:
        return [*self.trains, *(f"{name}0" for name in "LCA" if self.anchored and name in self.trains)]

    def now(self, f: Factors) -> Product:
        """Return s [L C A] as it is now."""
        return Product(f.L, self.core(f), f.A, self.scale)

    @property
    def pair(self) -> Callable[[Factors], Product] | None:
        # A product of one's own is made of other tensors than L and A, and a shared one has no gradient of a site.
        plain = type(self).now is Factored.now and type(self).group is Factored.group
        return self.now if plain and {"L", "A"} <= set(self.trains) else None

    def anchor(self, f: Factors) -> Product | None:
        if not self.anchored:
            return None
        core = f.started("C") if "C" in f._parameters else None
        return Product(f.started("L"), core, f.started("A"), self.scale)

    def update(self, f: Factors) -> Product:
        """Return ΔW = s([L C A]now − [L C A]start), in as few columns as possible."""
        anchor = self.anchor(f)
        return self.now(f) if anchor is None else difference(self.now(f), anchor)

    def product(self, f: Factors, folded: bool = False) -> Product:
        return self.now(f) if folded else self.update(f)

    def absolute(self, f: Factors, w0: Float[Tensor, "*b m n"]) -> Float[Tensor, "*b m n"]:
        products = (self.now(f), self.anchor(f), self.update(f))
        return sum(p.absolute() for p in products if p is not None)  # type: ignore[return-value]


@dataclass(frozen=True)
class Unscaled(Factored):
    """Abstract: a factored method without a scale in front of its update.

    Args:
        dropout: probability with which an entry of the adapter's input is dropped in training.
    """

    dropout: float = 0.0


@dataclass(frozen=True)
class Scaled(Factored):
    """Abstract: a factored method with a scale s in front of its update: 1, α/r or α/√r.

    Args:
        alpha: α of the scale s = α/r; ``None`` is α = r, a scale of one.
        dropout: probability with which an entry of the adapter's input is dropped in training.
        rs: rank-stabilised scale, s = α/√r.
    """

    alpha: float | None = None
    dropout: float = 0.0
    rs: bool = False

    resolved: ClassVar[tuple[str, ...]] = ("rank", "alpha")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"alpha {self.alpha} is not positive")

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()):
        found = super().at(site, m, n, clip, roles)
        asked = chosen(self.rank, site, roles)
        if not isinstance(asked, int) or found.rank == asked or (self.alpha is None and not self.rs):
            return found
        scale = dataclasses.replace(
            self, rank=asked
        ).scale  # a rank that was lowered keeps the scale that was asked for
        return dataclasses.replace(found, alpha=scale * (math.sqrt(found._rank) if self.rs else found._rank))

    @property
    def scale(self) -> float:
        """s, the factor in front of L C A: 1, α/r or α/√r."""
        if self.alpha is None and not self.rs:
            return 1.0
        alpha = self._rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self._rank) if self.rs else self._rank)


@dataclass(frozen=True)
class Triplets(Scaled):
    """Abstract: a scaled method whose update is a sum of triplets, which can be left out one by one.

    Args:
        allocate: a budget of triplets over all sites: one that is left out goes back to its start.
    """

    allocate: Budget | None = None

    pruned: ClassVar[tuple[str, ...]] = ("L", "A")  # a triplet is out when these are at their start

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocate is not None:
            object.__setattr__(self, "allocate", Budget.of(self.allocate))

    def before_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        if self.allocate is not None:
            self.allocate.before_step(sites, progress)

    def after_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        if self.allocate is not None:
            self.allocate.after_step(sites, self.pruned, progress)

    @property
    def changes_gradients(self) -> bool:
        return self.allocate is not None and self.allocate.importance == "paper"

    @property
    def keeps_state(self) -> bool:
        return self.allocate is not None

    @property
    def has_step(self) -> bool:
        return self.allocate is not None or self._steps_beyond(Triplets)


@dataclass(frozen=True)
class Decomposed(Factored):
    """Abstract: a factored method that starts from singular triplets of the weight.

    Args:
        driver: of the decomposition.
    """

    driver: Driver = "auto"

    def svd(self, w: Float[Tensor, "*b m n"], given: Given) -> SVD:
        """The leading ``rank`` triplets of the weight."""
        return truncated_svd(w, self._rank, self.driver, seed=given.seed, where=given.name)
