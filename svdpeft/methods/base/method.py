"""What a method is: how L, C, A start from a weight, which of them train, how C is structured.

    W' = W0 + s([L C A]now − [L C A]start)        L (*b, m, r)    C (r, r) structured    A (*b, r, n)

A method is a frozen dataclass of hyper-parameters. ``PerSite`` methods keep tensors beside each weight: a ``Factored``
one is on the equation above, a ``Transform`` is another function of W0. The baselines (full, partial, head only) train
whole parameters of the base and have no factors.
"""

from __future__ import annotations

import dataclasses
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from svdpeft.decomposition import Product
from svdpeft.methods.base.factors import Factors, Tensors
from svdpeft.methods.base.given import Given
from svdpeft.methods.base.hyperparameters import check_numbers
from svdpeft.methods.base.progress import Progress
from svdpeft.methods.base.reference import Reference


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
