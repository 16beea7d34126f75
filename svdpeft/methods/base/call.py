"""A layer in its own call, as a method outside the equation sees it."""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from svdpeft.decomposition import Product


class Call(Protocol):
    """A layer that is being called, as a method outside the equation sees it; what kind of layer it is stays hidden.

    Outputs are without the bias, in the dtype that the layer computes in, and new tensors. A method gets one in
    ``Transform.act``; ``sites.call.LayerCall`` is what it gets.

    Example:
        >>> class Doubling:  # W' = 2 W0, as a Transform's ``act`` may say it
        ...     def act(self, f, call):
        ...         return call.rows(torch.ones(call.w0.shape[:-1]))
        >>> class Linear:  # as much of a call as it takes
        ...     x, w0 = torch.ones(1, 3), torch.eye(2, 3)
        ...     def rows(self, values):
        ...         return self.x @ self.w0.mT * values
        >>> Doubling().act(None, Linear())
        tensor([[1., 1.]])
    """

    x: Tensor  # the layer's input

    @property
    def w0(self) -> Float[Tensor, "*b m n"]:
        """W0 as matrices, (*b, m, n), at least float32."""
        ...

    def rows(self, values: Float[Tensor, "*b m"]) -> Float[Tensor, "*out"]:
        """Return diag(values) W0 x, values (*b, m)."""
        ...

    def columns(self, values: Float[Tensor, "*b n"]) -> Float[Tensor, "*out"]:
        """Return W0 diag(values) x, values (*b, n)."""
        ...

    def frozen(self, x: Tensor) -> Tensor:
        """Return W0 x of another input; only where the layer multiplies the last axis of its input."""
        ...

    def per_row(self, values: Float[Tensor, " m"]) -> Tensor:
        """Return one value per row, (m,), as what multiplies an output; only where ``frozen`` can be asked for."""
        ...

    def outputs(self, x: Tensor | None = None) -> Float[Tensor, "... m"]:
        """Return W0 x of the site's own rows, (..., m), of the layer's input or another; only where ``frozen`` is."""
        ...

    def placed(self, y: Float[Tensor, "... m"]) -> Float[Tensor, "*out"]:
        """Return outputs of the site's own rows, (..., m), as one of the layer: of a part, zero everywhere else."""
        ...

    def add(self, out: Float[Tensor, "*out"] | None, product: Product, dropout: float = 0.0) -> Float[Tensor, "*out"]:
        """Add s L C A x to ``out``, in place, or to zero, with this dropout on x in training."""
        ...
