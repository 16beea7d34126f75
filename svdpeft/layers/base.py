"""What a layer kind is: how one kind of layer shows its weight as matrices, and how factors are applied to an input.

Every kind gives the matrix view; that is enough to adapt a weight where it is read (W0 + ΔW stands in its place). A
``CalledKind`` can also add the update to the output of a layer that is called, without building ΔW.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from svdpeft.decomposition import Product

POSITIONS = 1024  # tokens or pixels in a batch, for the choice between the two paths
SMALL = 2**18  # entries; a larger ΔW is never built, since autograd would keep a copy of the weight per site

Ranges = tuple[tuple[int, int, int], ...]  # rows of a matrix, as (start, stop, step) ranges


class Example(NamedTuple):
    """A module in float64 with an input, for the property tests; no matrix of it is square.

    Args:
        module: called as ``module(x)``; gives one tensor.
        x: its input.
        targets: names below the module that are adapted; ``""`` is the module itself.
    """

    module: nn.Module
    x: Tensor
    targets: tuple[str, ...] = ("",)


class LayerKind(ABC):
    """How a weight is a batch of matrices. Every method takes the layer that holds it."""

    name: str
    classes: ClassVar[tuple[str, ...]] = ()  # dotted names, so that an optional library is not imported
    parameter: ClassVar[str] = "weight"
    heads: int = 0  # of an attention, where the kind shows a matrix for each
    linear: bool = False  # multiplies the last axis of its input: taken by targets="all-linear"
    split: bool = False  # its parts are always adapted apart
    sees: bool = False  # it is called with vectors that its matrices multiply: see CalledKind.inputs

    @classmethod
    def match(cls, module: nn.Module, parameter: str) -> int | None:
        """How far up the layer's class hierarchy this kind's class is, or ``None``: the nearest kind adapts it."""
        if parameter != cls.parameter:
            return None
        return next((i for i, c in enumerate(type(module).__mro__) if dotted(c) in cls.classes), None)

    @classmethod
    def fits(cls, module: nn.Module, parameter: str) -> bool:
        """Whether a weight that was saved as one of this kind can be this one."""
        return cls.match(module, parameter) is not None

    @classmethod
    def roles(cls, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """Further names by which targets may call the weights of a model this kind knows: site name -> roles."""
        return {}

    @classmethod
    def objection(cls, model: nn.Module) -> str | None:
        """Why no adapter could be right on this model, or ``None``."""
        return None

    def called(self, module: nn.Module) -> bool:
        """Whether the layer's own ``forward`` is one that this kind can add an update to."""
        return False

    def parts(self, module: nn.Module, parameter: str) -> dict[str, Ranges]:
        """Parts of the weight that this kind knows of, as rows of its matrix."""
        return {}

    def to_json(self) -> dict[str, Any]:
        """Return what an adapter file says of the kind; ``from_json`` makes it again."""
        return {"kind": self.name, "axes": []}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> LayerKind:
        """Return the kind that ``to_json`` has written; most have nothing that differs from layer to layer."""
        return cls()

    @abstractmethod
    def to_matrix(self, module: nn.Module, w: Float[Tensor, "*stored"]) -> Float[Tensor, "*b m n"]:
        """Show a stored weight as matrices, (*b, m, n) = (*batch, out, in)."""

    @abstractmethod
    def from_matrix(self, module: nn.Module, matrix: Float[Tensor, "*b m n"]) -> Float[Tensor, "*stored"]:
        """The inverse: matrices (*b, m, n) as a weight in the layer's own layout."""

    @abstractmethod
    def examples(self) -> list[Example]:
        """What every property test runs over."""

    def prefers_dense(self, shape: tuple[int, int, int], rank: int, mixes: bool) -> bool:
        """Whether building ΔW costs fewer multiplications than going through the factors.

        Args:
            shape: (batch, m, n) of the site.
            rank: columns of the update.
            mixes: whether the core is a matrix, r² more multiplications per position.
        """
        batch, m, n = shape
        thin = POSITIONS * (rank * (m + n) + mixes * rank * rank)
        dense = POSITIONS * m * n + rank * m * n + mixes * m * rank * rank
        return batch * m * n <= SMALL and dense < thin


class CalledKind(LayerKind):
    """A layer that is called with one input. An update is never given a bias; the base layer has added it."""

    multiplies: bool = True  # its own forward is a product that factors of the whole weight can replace

    def called(self, module: nn.Module) -> bool:
        # A subclass with a ``forward`` of its own (weight standardisation, say) computes something else from its
        # weight: it is adapted where that forward reads the weight.
        owner = next(c for c in type(module).__mro__ if "forward" in vars(c))
        return dotted(owner) in self.classes

    @abstractmethod
    def apply(self, module: nn.Module, x: Tensor, product: Product) -> Tensor:
        """Return what the layer would give for ``x`` with weight ``s L C A`` and no bias, without building it."""

    @abstractmethod
    def run(self, module: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        """Return what the layer gives for ``x`` with weight ``w`` (stored layout) and no bias."""

    @abstractmethod
    def add_bias(self, module: nn.Module, out: Tensor) -> Tensor:
        """Return ``out`` plus the layer's bias, if it has one."""

    def inputs(self, module: nn.Module, x: Tensor) -> Float[Tensor, "... n"]:
        """Return the vectors that the layer's matrices multiply, (*b, *positions, n), of kinds that ``sees`` is of."""
        raise NotImplementedError

    def run_like(self, module: nn.Module, x: Tensor, w: Tensor, out: Tensor) -> Tensor:
        """``run``, where the size of the output is up to the caller: that of ``out``."""
        return self.run(module, x, w)

    def run_whole(self, module: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        """``run`` with the layer's whole weight; where the kind shows a part of it, the rest of the output is zero."""
        return self.run(module, x, w)

    def per_row(self, module: nn.Module, x: Tensor, values: Float[Tensor, "*b m"]) -> Tensor | None:
        """Values (*b, m), one per row of the matrices, as what multiplies an output; ``None``: rows are no outputs."""
        return None

    def add(self, module: nn.Module, x: Tensor, out: Tensor, product: Product) -> Tensor:
        """Add the update to the layer's fresh output, in place."""
        return out.add_(self.apply(module, x, product))

    def add_dense(self, module: nn.Module, x: Tensor, out: Tensor, product: Product) -> Tensor:
        """The same by way of the dense ΔW: cheaper where the matrices are tiny."""
        return out.add_(self.run(module, x, self.from_matrix(module, product.dense())))


def dotted(cls: type) -> str:
    """``nn.Linear`` -> ``torch.nn.modules.linear.Linear``."""
    return f"{cls.__module__}.{cls.__qualname__}"
