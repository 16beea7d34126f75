"""What a layer kind is: how one kind of layer shows its weight as matrices, and how factors are applied to an input.

Every kind gives the matrix view; that is enough to adapt a weight where it is read (W0 + ΔW stands in its place). A
``CalledKind`` can also add the update to the output of a layer that is called, without building ΔW.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Float, Int
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
    """Abstract: how one kind of layer shows its weight as a batch of matrices, (*b, m, n) = (*batch, out, in).

    A kind is made without arguments, and every method takes the layer that holds the weight. ``to_matrix``,
    ``from_matrix`` and ``examples`` are what it must say; every other default means "nothing special".

    Example:
        >>> from svdpeft.registry import KINDS
        >>> conv, kind = nn.Conv2d(4, 6, 3, groups=2), KINDS["conv"]()
        >>> matrix = kind.to_matrix(conv, conv.weight)  # 2 groups of 3 outputs and 2·3·3 inputs
        >>> matrix.shape, kind.from_matrix(conv, matrix).shape
        (torch.Size([2, 3, 18]), torch.Size([6, 2, 3, 3]))
    """

    name: str  # in the registry, written by ``KINDS.register``
    classes: ClassVar[tuple[str, ...]] = ()  # dotted names, so that an optional library is not imported
    parameter: ClassVar[str] = "weight"
    heads: int = 0  # of an attention, where the kind shows a matrix for each
    linear: bool = False  # multiplies the last axis of its input: taken by targets="all-linear"
    split: bool = False  # its parts are always adapted apart
    sees: bool = False  # it is called with vectors that its matrices multiply: see CalledKind.inputs

    @classmethod
    def match(cls, module: nn.Module, parameter: str) -> int | None:
        """Whether the kind adapts a parameter of a layer.

        Args:
            module: any layer.
            parameter: name of one of its parameters.

        Returns:
            How far up the layer's class hierarchy this kind's class is: of several kinds the nearest adapts it.
            ``None``: this one does not. The default looks the class up in ``classes``.
        """
        if parameter != cls.parameter:
            return None
        return next((i for i, c in enumerate(type(module).__mro__) if dotted(c) in cls.classes), None)

    @classmethod
    def fits(cls, module: nn.Module, parameter: str) -> bool:
        """Whether a weight that was saved as one of this kind can be this one."""
        return cls.match(module, parameter) is not None

    @classmethod
    def roles(cls, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """Further names by which targets may call the weights of a model: site name -> roles. By default none."""
        return {}

    @classmethod
    def objection(cls, model: nn.Module) -> str | None:
        """Why no adapter could be right on this model, or ``None``, the default; ``attach`` raises it."""
        return None

    def called(self, module: nn.Module) -> bool:
        """Whether the layer's own ``forward`` is one that this kind can add an update to; by default it is not.

        Then the weight is adapted where it is read: W0 + ΔW stands in its place.
        """
        return False

    def parts(self, module: nn.Module, parameter: str) -> dict[str, Ranges]:
        """Parts of a fused weight that this kind knows of: name -> (start, stop, step) ranges of rows of its matrix."""
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
        """Show a weight as matrices.

        Args:
            module: the layer.
            w: in the layout in which the layer stores it, and not necessarily its own parameter.

        Returns:
            (*b, m, n) = (*batch, out, in), a view where that is possible; differentiable.
        """

    @abstractmethod
    def from_matrix(self, module: nn.Module, matrix: Float[Tensor, "*b m n"]) -> Float[Tensor, "*stored"]:
        """The inverse of ``to_matrix``.

        Args:
            module: the layer.
            matrix: (*b, m, n).

        Returns:
            A weight in the layer's own layout; differentiable.
        """

    def widen(self, product: Product) -> Product:
        """Return an update of what the kind shows as one of the layer's whole matrices; by default it shows these."""
        return product

    @abstractmethod
    def examples(self) -> list[Example]:
        """Return small layers in float64, each with an input: what every property test runs over; none is square."""

    def per_example(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Sequence[str] | None:
        """Which inputs of the layer's own call have a row for each example: asked where that call reads the weight.

        Args:
            module: the layer.
            tensors: what it is called with, by the names of the arguments of its ``forward``.

        Returns:
            Names; all other tensors are for the whole batch. ``None``, the default of several tensors: not known.
        """
        return only_tensor(tensors)

    def prefers_dense(self, shape: tuple[int, int, int], rank: int, mixes: bool, frozen: bool = False) -> bool:
        """Whether a training step that builds ΔW costs fewer multiplications than one through the factors.

        A product costs one of its size in the forward, and one in the backward for each of its two that has a gradient.

        Args:
            shape: (batch, m, n) of the site.
            rank: columns of the update.
            mixes: whether the core is a matrix, r² more multiplications per position.
            frozen: whether L and A have no gradient.
        """
        batch, m, n = shape
        outer = 2 if frozen else 3  # products of the size of the one with L, or with A
        thin = POSITIONS * (outer * rank * (m + n) + 3 * mixes * rank * rank)
        dense = 3 * POSITIONS * m * n + outer * (rank * m * n + mixes * m * rank * rank)
        return batch * m * n <= SMALL and dense < thin


class CalledKind(LayerKind):
    """Abstract: a kind of layer that is called with one input x, and to whose output an update can be added.

        out + s L C A x        L (*b, m, r)    C none, (*b, r) or (*b, r, r)    A (*b, r, n)

    ``apply``, ``run`` and ``add_bias`` are what it must say beside ``LayerKind``; the rest follows from them, and is
    overridden where a layer can do it faster. An update never has a bias: the base layer has added it.

    Example:
        >>> from svdpeft.decomposition import Product
        >>> from svdpeft.registry import KINDS
        >>> linear, kind, x = nn.Linear(7, 5), KINDS["linear"](), torch.randn(2, 7)
        >>> update = Product(torch.randn(5, 1), None, torch.randn(1, 7), scale=0.5)
        >>> thin, whole = kind.apply(linear, x, update), kind.run(linear, x, update.dense())
        >>> torch.allclose(thin, whole, atol=1e-5)
        True
    """

    bands: bool = False  # it takes a core that is a band as it is
    multiplies: bool = True  # its own forward is a product that factors of the whole weight can replace

    def called(self, module: nn.Module) -> bool:
        # A subclass with a ``forward`` of its own (weight standardisation, say) computes something else from its
        # weight: it is adapted where that forward reads the weight.
        owner = next(c for c in type(module).__mro__ if "forward" in vars(c))
        return dotted(owner) in self.classes

    @abstractmethod
    def apply(self, module: nn.Module, x: Tensor, product: Product) -> Float[Tensor, "*out"]:
        """Return what the layer would give with the weight s L C A and no bias, without building that.

        Args:
            module: the layer.
            x: its input, in the dtype of the product.
            product: of thin factors: L (*b, m, r), C none, (*b, r) or (*b, r, r), A (*b, r, n), s its ``scale``;
                for a kind of ``bands`` C can also be one.

        Returns:
            A tensor of the shape of the layer's output, differentiable in ``x`` and in the factors.
        """

    @abstractmethod
    def run(self, module: nn.Module, x: Tensor, w: Float[Tensor, "*stored"]) -> Float[Tensor, "*out"]:
        """Return what the layer gives for ``x`` with another weight, in the stored layout, and no bias."""

    @abstractmethod
    def add_bias(self, module: nn.Module, out: Tensor) -> Tensor:
        """Return ``out`` plus the layer's bias, if it has one."""

    def suited(self, product: Product) -> Product:
        """Return a product with a core that this kind takes."""
        return product if self.bands else product.plain()

    def inputs(self, module: nn.Module, x: Tensor) -> Float[Tensor, "... n"]:
        """Return the vectors that the layer's matrices multiply, (*b, *positions, n), of kinds that ``sees`` is of."""
        raise NotImplementedError

    def run_like(
        self, module: nn.Module, x: Tensor, w: Float[Tensor, "*stored"], out: Float[Tensor, "*out"]
    ) -> Float[Tensor, "*out"]:
        """``run``, where the size of the output is up to the caller: that of ``out``."""
        return self.run(module, x, w)

    def run_whole(self, module: nn.Module, x: Tensor, w: Float[Tensor, "*stored"]) -> Float[Tensor, "*out"]:
        """``run`` with the layer's whole weight; where the kind shows a part of it, the rest of the output is zero."""
        return self.run(module, x, w)

    def narrow(self, out: Float[Tensor, "... k"]) -> Float[Tensor, "... m"]:
        """Return the outputs of the rows that the kind shows; only of kinds that are ``linear``."""
        return out

    def spread(self, out: Float[Tensor, "... m"]) -> Float[Tensor, "... k"]:
        """The inverse of ``narrow``, with zeros for all other rows."""
        return out

    def per_row(self, module: nn.Module, x: Tensor, values: Float[Tensor, "*b m"]) -> Tensor | None:
        """Values (*b, m), one per row of the matrices, as what multiplies an output; ``None``: rows are no outputs."""
        return None

    def add(self, module: nn.Module, x: Tensor, out: Float[Tensor, "*out"], product: Product) -> Float[Tensor, "*out"]:
        """Add the update to the layer's fresh output, in place at least where that has no gradient."""
        return out.add_(self.apply(module, x, product))

    def add_matrix(
        self, module: nn.Module, x: Tensor, out: Float[Tensor, "*out"], matrix: Float[Tensor, "*b m n"]
    ) -> Float[Tensor, "*out"]:
        """The same of a dense ΔW, in the dtype of ``out``: cheaper where the matrices are tiny."""
        return out.add_(self.run_like(module, x, self.from_matrix(module, matrix), out))

    def add_rows(
        self,
        module: nn.Module,
        x: Tensor,
        out: Float[Tensor, "*out"],
        matrix: Float[Tensor, "*b k n"],
        rows: Int[Tensor, " k"],
        total: int,
    ) -> Float[Tensor, "*out"]:
        """``add_matrix`` of a ΔW that is zero but for k of its ``total`` rows, at the ascending positions ``rows``."""
        whole = matrix.new_zeros(*matrix.shape[:-2], total, matrix.shape[-1])
        return self.add_matrix(module, x, out, whole.index_copy(-2, rows, matrix))


def only_tensor(tensors: Mapping[str, Tensor]) -> Sequence[str] | None:
    """The name of the one tensor, which has a row for each example; ``None`` where there are several."""
    return tuple(tensors) if len(tensors) == 1 else None


def dotted(cls: type) -> str:
    """``nn.Linear`` -> ``torch.nn.modules.linear.Linear``."""
    return f"{cls.__module__}.{cls.__qualname__}"
