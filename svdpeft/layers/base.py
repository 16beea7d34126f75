"""What a layer kind is: how one kind of layer shows its weight as matrices and applies factors to an input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from svdpeft.decomposition import Product

POSITIONS = 1024  # tokens or pixels in a batch, for the choice between the two paths
SMALL = 2**18  # entries; a larger ΔW is never built, since autograd would keep a copy of the weight per site


class LayerKind(ABC):
    """Stateless: every method takes the layer. An update is never given a bias; the base layer has added it."""

    name: ClassVar[str]
    # Dotted names of the classes whose ``forward`` this kind mirrors. Names, not classes, so that an optional
    # library is not imported; and a subclass with a ``forward`` of its own (weight standardisation, say) is
    # another layer, on which the same update would merge wrongly.
    forwards: ClassVar[tuple[str, ...]]
    linear: ClassVar[bool] = False  # taken by targets="all-linear"
    parameter: ClassVar[str] = "weight"

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """Whether the layer's ``forward`` is one that this kind mirrors."""
        owner = next(c for c in type(module).__mro__ if "forward" in vars(c))
        return f"{owner.__module__}.{owner.__qualname__}" in cls.forwards

    @abstractmethod
    def to_matrix(self, module: nn.Module, w: Tensor) -> Tensor:
        """Show a stored weight as matrices, (*b, m, n) = (*batch, out, in)."""

    @abstractmethod
    def from_matrix(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """The inverse: matrices (*b, m, n) as a weight in the layer's own layout."""

    @abstractmethod
    def apply(self, module: nn.Module, x: Tensor, product: Product) -> Tensor:
        """Return what the layer would give for ``x`` with weight ``s L C A`` and no bias, without building it."""

    @abstractmethod
    def run(self, module: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        """Return what the layer gives for ``x`` with weight ``w`` (stored layout) and no bias."""

    @abstractmethod
    def add_bias(self, module: nn.Module, out: Tensor) -> Tensor:
        """Return ``out`` plus the layer's bias, if it has one."""

    @abstractmethod
    def examples(self) -> list[tuple[nn.Module, Tensor]]:
        """Layers in float64 with an input each, never square: every property test runs over them."""

    def add(self, module: nn.Module, x: Tensor, out: Tensor, product: Product) -> Tensor:
        """Add the update to the layer's fresh output, in place."""
        return out.add_(self.apply(module, x, product))

    def add_dense(self, module: nn.Module, x: Tensor, out: Tensor, product: Product) -> Tensor:
        """The same by way of the dense ΔW: cheaper where the matrices are tiny."""
        return out.add_(self.run(module, x, self.from_matrix(module, product.dense())))

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
