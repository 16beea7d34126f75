"""What a method is: how L, C, A start from a weight, which of them train, how C is structured.

    W' = W0 + s([L C A]now − [L C A]start)        L (*b, m, r)    C (r, r) structured    A (*b, r, n)

A method is a frozen dataclass of hyper-parameters. ``Factored`` methods live in factors beside the weight;
the baselines (full, partial, head only) train whole parameters of the base and have no factors.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from svdpeft.decomposition import Product, check_rank, difference

Tensors = dict[str, Tensor]
BRACKETS = re.compile(r"(.*[\w)])\[([A-Za-z]\w*(?:\s*,\s*[A-Za-z]\w*)*)\]")  # qkv[q,v]: a pattern, and words


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
    factored: ClassVar[bool] = True  # False: no factors, trains parameters of the base itself

    def whole(self) -> tuple[str, ...]:
        """Patterns of the base's own parameters that this method trains whole."""
        return ()

    def to_json(self) -> dict[str, Any]:
        """Return ``{"name": …, hyper-parameters}``; ``method(name)(**rest)`` builds it again."""
        return {"name": self.name, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        changed = [
            f"{f.name}={value!r}"
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) != f.default or f.name == "rank"
        ]
        return f"{type(self).__name__}({', '.join(changed)})"


class Factors(nn.Module):
    """The tensors of one site by name (``L``, ``C``, ``A`` and what a method adds), a child of the adapted layer.

    Everything floating point is a parameter, the frozen ones with ``requires_grad=False``: unlike buffers they are
    sharded with the layer and are not broadcast at every step. Start values are called ``L0``, ``C0``, ``A0``.
    """

    L: Tensor
    C: Tensor
    A: Tensor
    sigma: Tensor
    index: Tensor
    gate: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], trains: Sequence[str]) -> None:
        super().__init__()
        self.trains = tuple(trains)
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=name in trains))
            else:
                self.register_buffer(name, tensor)

    def tensors(self) -> Tensors:
        """Every tensor of the site, detached, by name."""
        return {name: t.detach() for name, t in (*self.named_parameters(), *self.named_buffers())}

    def started(self, name: str) -> Tensor:
        """The start value of a factor: ``L0`` where ``L`` trains, ``L`` itself where it is frozen."""
        return getattr(self, f"{name}0" if f"{name}0" in self._parameters else name)


@dataclass(frozen=True)
class Factored(Method):
    """A method that keeps factors beside an untouched weight.

    Args:
        rank: number of columns of L, or a mapping from site pattern to rank (the first pattern that matches wins).
        alpha: the update is scaled by alpha / rank; ``None`` is alpha = rank, a scale of one.
        dropout: probability with which an entry of the adapter's input is dropped in training.
    """

    rank: int | Mapping[str, int] | None = 8
    alpha: float | None = None
    dropout: float = 0.0

    trains: ClassVar[tuple[str, ...]] = ("L", "A")
    anchored: ClassVar[bool] = True  # the start LCA is subtracted; False where it is zero
    exact_start: ClassVar[bool] = True  # the adapted model starts as the base model
    knob: ClassVar[str] = "rank"  # the hyper-parameter that a budget turns

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout {self.dropout} is outside [0, 1)")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"alpha {self.alpha} is not positive")

    # -- what a method defines ----------------------------------------------------------------------------------

    @abstractmethod
    def start(self, w: Tensor, seed: int, where: str) -> Tensors:
        """Return the factors at the start.

        Args:
            w: the weight as matrices, (*b, m, n), finite, float32 or float64.
            seed: of this site, already different from every other site's.
            where: the site's name, for messages.

        Returns:
            ``L`` (*b, m, r), ``A`` (*b, r, n) and, where the core is not the identity, ``C``; what is not named in
            ``trains`` is frozen.
        """

    def core(self, f: Factors) -> Tensor | None:
        """Return C as an operator: ``None``, a diagonal (*b, r) or a matrix (*b, r, r)."""
        return f.C if "C" in f._parameters else None

    def start_core(self, f: Factors) -> Tensor | None:
        """Return C at the start, as an operator."""
        return f.started("C") if "C" in f._parameters else None

    @abstractmethod
    def count(self, batch: int, m: int, n: int) -> int:
        """Number of trained values at one site of ``batch`` m×n matrices; ``rank`` is a number here."""

    def export_rank(self, m: int, n: int) -> int:
        """An upper bound on the rank of W' − W0 at one site, before anything is trained."""
        return min((2 if self.anchored and {"L", "A"} <= set(self.trains) else 1) * self._rank, m, n)

    def replaces_weight(self, m: int, n: int) -> bool:
        """Whether [L C A]start is all of W0, so that a folded site has no use for the weight."""
        return False

    def penalty(self, sites: Sequence[Factors]) -> Tensor | None:
        """Return what is added to the loss, a scalar, or ``None``."""
        return None

    def before_step(self, sites: Sequence[Factors], peak_lr: float) -> None:
        """Change the gradients, after clipping and before the optimizer's step."""

    def after_step(self, sites: Sequence[Factors], lr_scale: float) -> None:
        """Change the factors after the optimizer's step; ``lr_scale`` is the schedule's lr_t / lr_peak."""

    @property
    def changes_gradients(self) -> bool:
        """Whether ``before_step`` must be called for the method to be what its name says."""
        return False

    # -- what follows from it -----------------------------------------------------------------------------------

    @property
    def _rank(self) -> int:
        assert isinstance(self.rank, int), "the rank is resolved per site by at()"
        return self.rank

    @property
    def scale(self) -> float:
        """s, the factor in front of L C A."""
        return 1.0 if self.alpha is None else self.alpha / self._rank

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()):
        """Return this method with the rank of one site as a number.

        Args:
            site: the site's name, matched against the patterns of a rank mapping.
            m: rows of the site's matrices.
            n: columns.
            clip: lower a rank that is larger than min(m, n) instead of refusing it.
            roles: further names of the site that a pattern may mean.
        """
        rank = self.rank
        if isinstance(rank, Mapping):
            names = (site, site.partition("[")[0], *roles)  # a part also goes by the name of its layer
            matching = [value for pattern, value in rank.items() if any(matches(pattern, n) for n in names)]
            if not matching:
                raise ValueError(f"no pattern of rank={rank!r} matches {site}; '.*' matches the rest")
            rank = matching[0]
        if rank is None:
            rank = min(m, n)
        if clip and isinstance(rank, int):
            rank = min(rank, m, n)
        return dataclasses.replace(self, rank=check_rank(rank, m, n, site))

    def factors(self, w: Tensor, seed: int, where: str) -> Factors:
        """Build the site's factors, with the start values of those that train if the method is anchored."""
        tensors = self.start(w, seed, where)
        if self.anchored:
            tensors |= {f"{name}0": tensors[name].clone() for name in self.trains}
        return Factors(tensors, self.trains)

    def now(self, f: Factors) -> Product:
        """Return s [L C A] as it is now."""
        return Product(f.L, self.core(f), f.A, self.scale)

    def anchor(self, f: Factors) -> Product | None:
        """Return s [L C A]start, the part of W0 that the factors took over; ``None`` where it is zero."""
        if not self.anchored:
            return None
        return Product(f.started("L"), self.start_core(f), f.started("A"), self.scale)

    def update(self, f: Factors) -> Product:
        """Return ΔW = s([L C A]now − [L C A]start), in as few columns as possible."""
        anchor = self.anchor(f)
        return self.now(f) if anchor is None else difference(self.now(f), anchor)


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` names ``name``: exactly, as a suffix of whole dotted parts, or as a regular expression.

    Of a fused weight ``qkv[q,v]`` names the parts ``qkv[q]`` and ``qkv[v]``.

    Example:
        >>> matches("attn.qkv", "blocks.0.attn.qkv"), matches("kv", "blocks.0.attn.qkv"), matches(".*qkv", "a.qkv")
        (True, False, True)
    """
    if name == pattern or name.endswith("." + pattern):
        return True
    layer, _, part = name.removesuffix("]").partition("[")
    if part and (found := BRACKETS.fullmatch(pattern)) is not None:
        return part in re.split(r"\s*,\s*", found[2]) and matches(found[1], layer)
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} is neither a name nor a regular expression: {error}") from error


def by_shape(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Group the positions of tensors that can be stacked, so that one batched call serves many sites.

    Example:
        >>> by_shape([torch.zeros(2, 3), torch.zeros(1), torch.zeros(2, 3)])
        [[0, 2], [1]]
    """
    groups: dict[tuple, list[int]] = {}
    for i, t in enumerate(tensors):
        groups.setdefault((t.shape, t.dtype, t.device), []).append(i)
    return list(groups.values())


def generator(seed: int) -> torch.Generator:
    """A CPU generator: a seed means the same numbers on every device and leaves the global state alone."""
    return torch.Generator().manual_seed(seed)
