"""A method that keeps tensors beside each untouched weight: its start, its count, and how it acts on the weight."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from svdpeft.decomposition import Product
from svdpeft.methods.base.factors import Factors, Tensors
from svdpeft.methods.base.given import Given
from svdpeft.methods.base.hooks import Hooks
from svdpeft.methods.base.hyperparameters import check_numbers


@dataclass(frozen=True)
class PerSite(Hooks):
    """Abstract: a ``Factored`` method acts by a thin product, a ``Transform`` by another function of the weight.

    Example:
        >>> from svdpeft.methods.base import Given
        >>> w = torch.randn(6, 4)
        >>> site = Given("fc", (1, 6, 4), 0, lambda: w)
        >>> method = svdpeft.PiSSA(rank={"fc": 2}).at("fc", 6, 4)
        >>> f = method.factors(site)
        >>> f.L.shape, f.A.shape, method.count(1, 6, 4), bool((method.product(f).dense() == 0).all())
        (torch.Size([6, 2]), torch.Size([2, 4]), 20, True)
    """

    trains: ClassVar[tuple[str, ...]] = ("L", "A")  # names of the tensors that train
    resolved: ClassVar[tuple[str, ...]] = ()  # hyper-parameters that ``at`` settles for one site

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout {self.dropout} is outside [0, 1)")

    # -- what a method says ---------------------------------------------------------------------------------------

    @abstractmethod
    def start(self, w: Float[Tensor, "*b m n"], given: Given) -> Tensors:
        """Return the tensors of one site at the start.

        Args:
            w: the weight as matrices, (*b, m, n), finite, float32 or float64.
            given: name, seed, what a calibration saw of the site, what it shares with others.

        Returns:
            Name -> tensor: what ``trains`` names trains, other floating-point tensors are frozen parameters, integer
            tensors become buffers. In the dtype of ``w`` and on its device.
        """

    @abstractmethod
    def count(self, batch: int, m: int, n: int) -> int:
        """Number of values that train at one site of ``batch`` m×n matrices and nowhere else."""

    @abstractmethod
    def absolute(self, f: Factors, w0: Float[Tensor, "*b m n"]) -> Float[Tensor, "*b m n"]:
        """Return the sum of the absolute values of all terms of which W' − W0 is made, (*b, m, n).

        It is what the rounding of the change is relative to, and so what the tests' bounds are made of.
        """

    def export_rank(self, m: int, n: int) -> int | None:
        """An upper bound on the rank of W' − W0, before anything is trained; ``None``: full, no LoRA can hold it."""
        return None

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()):
        """Return the method as it is at one site, ranks as numbers.

        Args:
            site: its name, matched against the patterns of a mapping.
            m: rows of its matrices.
            n: columns.
            clip: lower what is too large for the matrix instead of refusing it.
            roles: further names of the site that a pattern may mean.
        """
        return self

    @property
    def _rank(self) -> int:
        """r at one site, of a method that has a rank."""
        rank = vars(self)["rank"]
        assert isinstance(rank, int), "the rank is resolved per site by at()"
        return rank

    def turned(self, value: Any) -> PerSite:
        """The method with another value of its knob."""
        return dataclasses.replace(self, **{self.knob: value})

    def general(self) -> PerSite:
        """The method without what ``at`` has settled: equal for all sites that act together."""
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name in self.resolved}
        return dataclasses.replace(self, **defaults)

    def resolve(self, sites: Sequence[Given], clip: bool) -> list[PerSite]:
        """Return the method as it is at each of the sites that are attached together."""
        return [self.at(site.name, *site.shape[1:], clip=clip, roles=site.roles) for site in sites]

    def total(self, sites: Sequence[Given], clip: bool = True) -> int:
        """Number of values that train on these sites together, what they share counted once."""
        resolved = self.resolve(sites, clip)
        own = sum(method.count(*site.shape) for method, site in zip(resolved, sites, strict=True))
        return own + sum(method.shared_count(members) for method, members in grouped(resolved, sites).values())

    # -- how it acts: Factored and Transform ----------------------------------------------------------------------

    def factors(self, given: Given) -> Factors:
        """Build the site's tensors."""
        return Factors(self.start(given.weight(), given), self.trains, given.shared, given.shape)

    def tensor_names(self) -> list[str]:
        """Names that the tensors of a site are known to have: a file without one of them is damaged."""
        return list(self.trains)

    def product(self, f: Factors, folded: bool = False) -> Product | None:
        """Return what is added to the weight as a product of thin factors; ``None`` where it is not one."""
        return None

    def as_product(self, f: Factors, w0: Callable[[], Tensor]) -> Product | None:
        """Return W' − W0 as a product of thin factors, also where these are made from the weight; else ``None``.

        Args:
            f: the site's tensors.
            w0: gives the weight as matrices, (*b, m, n); only called where it is needed.
        """
        return self.product(f)

    def anchor(self, f: Factors) -> Product | None:
        """Return s [L C A]start, the part of W0 that the factors took over; ``None`` where it is zero."""
        return None

    def replaces_weight(self, m: int, n: int) -> bool:
        """Whether [L C A]start is all of W0, so that a folded site has no use for the weight."""
        return False

    def delta(self, f: Factors, w0: Float[Tensor, "*b m n"]) -> Float[Tensor, "*b m n"]:
        """Return W' − W0 of matrices w0, (*b, m, n): only asked where there is no product."""
        raise NotImplementedError


def grouped(methods: Sequence[PerSite], sites: Sequence[Given]) -> dict[tuple, tuple[PerSite, list[Given]]]:
    """Gather the sites that share tensors: one of the methods and its sites, by method, group, dtype and device.

    Ranks may differ within a group, unless the method names the rank in it.
    """
    groups: dict[tuple, tuple[PerSite, list[Given]]] = {}
    for method, site in zip(methods, sites, strict=True):
        if (name := method.group(site)) is not None:
            key = (repr(method.general()), name, site.dtype, site.device)
            groups.setdefault(key, (method, []))[1].append(site)
    return groups
