"""The methods on the one equation: W' = W0 + s([L C A]now − [L C A]start)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from svdpeft.decomposition import SVD, Driver, Product, check_rank, difference, truncated_svd
from svdpeft.methods.base.allocation import Budget
from svdpeft.methods.base.factors import Factors
from svdpeft.methods.base.given import Given
from svdpeft.methods.base.method import PerSite
from svdpeft.methods.base.progress import Progress
from svdpeft.patterns import chosen


@dataclass(frozen=True)
class Factored(PerSite):
    """A method on the one equation: W' = W0 + s([L C A]now − [L C A]start).

    Args:
        rank: number of columns of L, or a mapping from site pattern to rank (the first pattern that matches wins).
        alpha: the update is scaled by alpha / rank; ``None`` is alpha = rank, a scale of one.
        dropout: probability with which an entry of the adapter's input is dropped in training.
        rs: rank-stabilised scale, alpha / √rank.
        allocate: a budget of triplets over all sites, for methods whose update is a sum of triplets.
    """

    rank: int | Mapping[str, int] | None = 8
    alpha: float | None = None
    dropout: float = 0.0
    rs: bool = False
    allocate: Budget | None = None

    anchored: ClassVar[bool] = True  # the start LCA is subtracted; False where it is zero
    scaled: ClassVar[bool] = True  # the method has a scale s
    pruned: ClassVar[tuple[str, ...]] = ()  # a triplet is out when these are at their start; (): has no triplets

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout {self.dropout} is outside [0, 1)")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"alpha {self.alpha} is not positive")
        if not self.scaled and (self.alpha is not None or self.rs):
            given = "rs=True" if self.alpha is None else f"alpha {self.alpha}"
            raise ValueError(f"{given}: {type(self).__name__} has no scale in front of its update")
        if self.allocate is not None:
            if not self.pruned:
                raise ValueError(
                    "allocate works with methods whose update is a sum of triplets that can be left out one by one, "
                    f"such as AdaLoRA, SORSA, PiSSA and LoRA; it is not offered for {type(self).__name__}"
                )
            object.__setattr__(self, "allocate", Budget.of(self.allocate))

    def core(self, f: Factors) -> Tensor | None:
        """Return C as an operator: ``None``, a diagonal (*b, r) or a matrix (*b, r, r)."""
        return f.C if "C" in f._parameters else None

    def start_core(self, f: Factors) -> Tensor | None:
        """Return C at the start, as an operator."""
        return f.started("C") if "C" in f._parameters else None

    def default_rank(self, m: int, n: int) -> int:
        """What ``rank=None`` means."""
        return min(m, n)

    def rank_limit(self, m: int, n: int) -> int | None:
        """The largest rank; ``None``: any."""
        return min(m, n)

    def export_rank(self, m: int, n: int) -> int | None:
        return min((2 if self.anchored and {"L", "A"} <= set(self.trains) else 1) * self._rank, m, n)

    # -- what follows from it -------------------------------------------------------------------------------------

    @property
    def _rank(self) -> int:
        assert isinstance(self.rank, int), "the rank is resolved per site by at()"
        return self.rank

    @property
    def scale(self) -> float:
        """s, the factor in front of L C A: 1, α/r or α/√r."""
        if self.alpha is None and not self.rs:
            return 1.0
        alpha = self._rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self._rank) if self.rs else self._rank)

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()):
        """Return this method with the rank of one site as a number.

        Args:
            site: the site's name, matched against the patterns of a rank mapping.
            m: rows of the site's matrices.
            n: columns.
            clip: lower a rank that is larger than min(m, n) instead of refusing it.
            roles: further names of the site that a pattern may mean.
        """
        rank = chosen(self.rank, site, roles)
        if rank is None:
            rank = self.default_rank(m, n)
        limit = self.rank_limit(m, n)
        if clip and limit is not None and isinstance(rank, int):
            rank = min(rank, limit)
        return dataclasses.replace(self, rank=check_rank(rank, m, n, site, math.inf if limit is None else limit))

    def general(self) -> Factored:
        return dataclasses.replace(self, rank=1)

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

    def anchor(self, f: Factors) -> Product | None:
        if not self.anchored:
            return None
        return Product(f.started("L"), self.start_core(f), f.started("A"), self.scale)

    def update(self, f: Factors) -> Product:
        """Return ΔW = s([L C A]now − [L C A]start), in as few columns as possible."""
        anchor = self.anchor(f)
        return self.now(f) if anchor is None else difference(self.now(f), anchor)

    def product(self, f: Factors, folded: bool = False) -> Product:
        return self.now(f) if folded else self.update(f)

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


@dataclass(frozen=True)
class Decomposed(Factored):
    """A factored method that starts from singular triplets of the weight.

    Args:
        driver: of the decomposition.
    """

    driver: Driver = "auto"

    def svd(self, w: Tensor, given: Given) -> SVD:
        """The leading ``rank`` triplets of the weight."""
        return truncated_svd(w, self._rank, self.driver, seed=given.seed, where=given.name)
