"""What a method is: how L, C, A start from a weight, which of them train, how C is structured.

    W' = W0 + s([L C A]now − [L C A]start)        L (*b, m, r)    C (r, r) structured    A (*b, r, n)

A method is a frozen dataclass of hyper-parameters. ``PerSite`` methods keep tensors beside each weight: a ``Factored``
one is on the equation above, a ``Transform`` is another function of W0. The baselines (full, partial, head only) train
whole parameters of the base and have no factors.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from svdpeft.allocation import Budget
from svdpeft.decomposition import SVD, Driver, Product, check_rank, difference, truncated_svd
from svdpeft.factors import Call, Factors, Given, Progress, Tensors, check_numbers
from svdpeft.patterns import chosen


@dataclass(frozen=True)
class Reference:
    """Where a method was published.

    Args:
        key: BibTeX key.
        authors: names joined by " and ", as BibTeX wants them.
        title: title of the paper.
        year: year of publication.
        venue: conference or journal; "arXiv preprint" for a preprint.
        arxiv: arXiv identifier, or "" where there is none.
    """

    key: str
    authors: str
    title: str
    year: int
    venue: str = "arXiv preprint"
    arxiv: str = ""

    def bibtex(self) -> str:
        """Return the BibTeX entry."""
        kind, field = ("article", "journal") if self.venue == "arXiv preprint" else ("inproceedings", "booktitle")
        rows = {
            "title": f"{{{self.title}}}",
            "author": self.authors,
            field: self.venue,
            "year": str(self.year),
        }
        if self.arxiv:
            rows |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        body = ",\n".join(f"  {key} = {{{value}}}" for key, value in rows.items())
        return f"@{kind}{{{self.key},\n{body}\n}}"


@dataclass(frozen=True)
class Method(ABC):
    """A fine-tuning method; the class attributes are what a comparison and the documentation say of it."""

    name: ClassVar[str]
    reference: ClassVar[Reference | None] = None
    latex: ClassVar[str] = ""  # the formula, for the documentation
    example: ClassVar[str] = ""  # a program for the documentation, where the usual one does not do
    factored: ClassVar[bool] = True  # False: no factors, trains parameters of the base itself

    def whole(self, model: nn.Module) -> tuple[str, ...]:
        """Patterns of the base's own parameters that this method trains whole."""
        return ()

    def to_json(self) -> dict[str, Any]:
        """Return ``{"name": …, hyper-parameters}``; ``method(name)(**rest)`` builds it again."""
        return {"name": self.name, **{f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}}

    def __str__(self) -> str:
        changed = [
            f"{f.name}={value!r}"
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) != f.default or f.name == "rank"
        ]
        return f"{type(self).__name__}({', '.join(changed)})"


@dataclass(frozen=True)
class PerSite(Method):
    """A method that keeps tensors beside each untouched weight. The next two classes say how they act on it."""

    trains: ClassVar[tuple[str, ...]] = ("L", "A")  # names of the tensors that train
    exact_start: ClassVar[bool] = True  # the adapted model starts as the base model
    knob: ClassVar[str] = "rank"  # the hyper-parameter that a budget turns
    settable: ClassVar[tuple[str, ...]] = ()  # frozen one-element tensors that adapter.set() writes
    pairs: ClassVar[tuple[str, ...]] = ()  # it decomposes products of an attention's weights by head: "qk", "vo"
    needs: ClassVar[Literal["", "inputs", "gradients"]] = ""  # what of a calibration it starts from

    def __post_init__(self) -> None:
        check_numbers(self)

    # -- what a method defines ----------------------------------------------------------------------------------

    @abstractmethod
    def start(self, w: Tensor, given: Given) -> Tensors:
        """Return the tensors of one site at the start; what is not named in ``trains`` is frozen.

        Args:
            w: the weight as matrices, (*b, m, n), finite, float32 or float64.
            given: name, seed, what a calibration saw of the site, what it shares with others.
        """

    @abstractmethod
    def count(self, batch: int, m: int, n: int) -> int:
        """Number of values that train at one site of ``batch`` m×n matrices and nowhere else."""

    def export_rank(self, m: int, n: int) -> int | None:
        """An upper bound on the rank of W' − W0, before anything is trained; ``None``: full, no LoRA can hold it."""
        return None

    def why_not(self, kind: Any) -> str | None:
        """Why the method is not defined on a layer kind, or ``None`` where it is."""
        if self.needs == "inputs" and not kind.sees:
            return (
                f"{type(self).__name__} starts from the inputs of a layer, and weights of kind {kind.name!r} see none"
            )
        return None

    def supports(self, kind: Any) -> bool:
        """Whether the method is defined on a layer kind."""
        return self.why_not(kind) is None

    # Across sites. Most methods leave these four as they are.

    def resolve(self, sites: Sequence[Given], clip: bool) -> list[PerSite]:
        """Return the method as it is at each site, ranks as numbers."""
        return [self.at(site.name, *site.shape[1:], clip=clip, roles=site.roles) for site in sites]

    def group(self, given: Given) -> str | None:
        """The group of sites that share tensors with this one; ``None``: it shares nothing."""
        return None

    def share(self, group: Sequence[Given]) -> Tensors:
        """Return what the sites of one group share; names in ``trains`` train, integer tensors become buffers."""
        return {}

    def shared_count(self, group: Sequence[Given]) -> int:
        """Number of values that train and that all sites of one group share."""
        return 0

    def shared_seed(self, given: Given) -> int:
        """A seed for what a group shares: of the attachment's seed and the group's name, not of who is in it."""
        return zlib.crc32(f"{given.origin}/{self.group(given)}".encode())

    def knob_values(self, sites: Sequence[Given]) -> Sequence[Any]:
        """The values of the knob that a budget may choose, the smallest count first."""
        return range(1 if self.knob == "rank" else 0, max(min(site.shape[1:]) for site in sites) + 1)

    def turned(self, value: Any) -> PerSite:
        """The method with another value of its knob."""
        return dataclasses.replace(self, **{self.knob: value})

    def penalty(self, sites: Sequence[Factors]) -> Tensor | None:
        """Return what is added to the loss, a scalar, or ``None``."""
        return None

    def before_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        """Change the gradients, after clipping and before the optimizer's step."""

    def after_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        """Change the factors after the optimizer's step."""

    @property
    def changes_gradients(self) -> bool:
        """Whether ``before_step`` must be called for the method to be what its name says."""
        return False

    @property
    def keeps_state(self) -> bool:
        """Whether it keeps something from step to step: ``after_step`` must be called, and a resumed run needs it."""
        return False

    # -- how it acts: Factored and Transform ----------------------------------------------------------------------

    @property
    def dropout(self) -> float:  # a field of the methods that have one
        """Probability with which an entry of the adapter's input is dropped in training."""
        return 0.0

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()):
        """Return the method as it is at one site."""
        return self

    def general(self) -> PerSite:
        """The method without what differs from site to site: equal for all sites that act together."""
        return self

    def product(self, f: Factors, folded: bool = False) -> Product | None:
        """Return what is added to the weight as a product of thin factors; ``None`` where it is not one."""
        return None

    def anchor(self, f: Factors) -> Product | None:
        """Return s [L C A]start, the part of W0 that the factors took over; ``None`` where it is zero."""
        return None

    def replaces_weight(self, m: int, n: int) -> bool:
        """Whether [L C A]start is all of W0, so that a folded site has no use for the weight."""
        return False

    def delta(self, f: Factors, w0: Tensor) -> Tensor:
        """Return W' − W0 of matrices w0, (*b, m, n): only asked where there is no product."""
        raise NotImplementedError

    # -- what follows ---------------------------------------------------------------------------------------------

    def factors(self, given: Given) -> Factors:
        """Build the site's tensors."""
        return Factors(self.start(given.weight(), given), self.trains, given.shared, given.shape)

    def tensor_names(self) -> list[str]:
        """Names that the tensors of a site are known to have."""
        return list(self.trains)

    def total(self, sites: Sequence[Given], clip: bool = True) -> int:
        """Number of values that train on these sites together, what they share counted once."""
        resolved = self.resolve(sites, clip)
        own = sum(method.count(*site.shape) for method, site in zip(resolved, sites, strict=True))
        return own + sum(method.shared_count(members) for method, members in grouped(resolved, sites).values())


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


@dataclass(frozen=True)
class Transform(PerSite):
    """A method outside the equation: W' is another function of W0 and of the site's tensors.

    ``delta`` is enough for every kind of layer. Where ``acts`` says so, ``act`` gives a called layer the same change
    without building ΔW.
    """

    @abstractmethod
    def delta(self, f: Factors, w0: Tensor) -> Tensor:
        """Return W' − W0 of matrices w0, (*b, m, n), differentiable in the site's tensors."""

    def acts(self, linear: bool) -> bool:
        """Whether ``act`` is defined on a layer that is called; ``linear``: it multiplies its input's last axis."""
        return False

    def act(self, f: Factors, call: Call) -> Tensor:
        """Return ΔW x of a layer in its own call."""
        raise NotImplementedError


def _plain(value: Any) -> Any:
    """A hyper-parameter as JSON: classes with parts that are classes take those parts as mappings, too."""
    if isinstance(value, Method):
        return value.to_json()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]


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


def generator(seed: int) -> torch.Generator:
    """A CPU generator: a seed means the same numbers on every device and leaves the global state alone."""
    return torch.Generator().manual_seed(seed)
