"""A banded core, kept as its diagonals: applied and differentiated entry by entry, r² is never built.

    C[i, i + o] = diagonals[d + o, i]        −d <= o <= d, zero where i + o is outside [0, r)

C z takes 2d + 1 passes over z, and so does each gradient: of the core's own only the entries in the band are computed,
and what is kept for it is z and the diagonals.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

FEW = 2**14  # values of z, below which the number of kernels is what counts


class Band(NamedTuple):
    """A core that is zero but for 2d + 1 diagonals, (*b, 2d + 1, r).

    Example:
        >>> core = Band(torch.tensor([[0.0, 5.0], [1.0, 2.0], [7.0, 0.0]]))
        >>> core.matrix(), core.through(torch.tensor([1.0, 10.0]))
        (tensor([[1., 7.],
                [5., 2.]]), tensor([71., 25.]))
    """

    diagonals: Float[Tensor, "*b d r"]

    @classmethod
    def of(cls, values: Float[Tensor, "*b k"], index: Int[Tensor, " k"], rank: int, off_diagonals: int) -> Band:
        """Sort the entries of a sparse core, whose positions are all in the band, into diagonals."""
        d = min(off_diagonals, rank - 1)
        row = torch.div(index, rank, rounding_mode="floor")
        at = (index - row * (rank + 1) + d) * rank + row
        flat = values.new_zeros(*values.shape[:-1], (2 * d + 1) * rank)
        return cls(flat.scatter(-1, at.expand_as(values), values).unflatten(-1, (2 * d + 1, rank)))

    def matrix(self) -> Float[Tensor, "*b r r"]:
        """Return the core as a matrix."""
        count, r = self.diagonals.shape[-2:]
        # Rows of r + count numbers, read as rows of one number less: each begins one further to the right.
        rows = F.pad(self.diagonals.mT, (0, r)).flatten(-2)[..., :-r]
        return rows.unflatten(-1, (r, r + count - 1))[..., count // 2 : count // 2 + r]

    def plus(self, diagonal: Float[Tensor, "*b r"]) -> Band:
        """Return the core with more on its main diagonal."""
        d = self.diagonals.shape[-2] // 2
        return Band(self.diagonals + F.pad(diagonal.unsqueeze(-2), (0, 0, d, d)))

    def through(self, z: Float[Tensor, "... r"]) -> Float[Tensor, "... r"]:
        """Return C z of the vectors along the last axis, of a core that has no batch."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or z.numel() > FEW:
            return across(self.diagonals, z)
        d, r = self.diagonals.shape[0] // 2, z.shape[-1]
        return (F.pad(z, (d, d)).unfold(-1, r, 1) * self.diagonals).sum(-2)  # four kernels for a token, and not twelve

    def after(self, left: Float[Tensor, "*b m r"]) -> Float[Tensor, "*b m r"]:
        """Return L C."""
        return across(self.diagonals.movedim(-2, 0).unsqueeze(-2), left, back=True)

    def abs(self) -> Band:
        """Return the core of the absolute values."""
        return Band(self.diagonals.abs())

    def to(self, dtype: torch.dtype) -> Band:
        """Return the core in another dtype."""
        return Band(self.diagonals.to(dtype))


def across(diagonals: Float[Tensor, "d *#s r"], z: Float[Tensor, "*s r"], back: bool = False) -> Float[Tensor, "*s r"]:
    """Return C z along the last axis, or Cᵀz where ``back``.

    Args:
        diagonals: of C; without its first axis it broadcasts to z.
        z: in the same dtype.
        back: multiply by the transposed core.

    Example:
        >>> across(torch.tensor([[0.0, 5.0], [1.0, 2.0], [7.0, 0.0]]), torch.tensor([1.0, 10.0]), back=True)
        tensor([51., 27.])
    """
    if torch.compiler.is_compiling():  # which makes one pass of it, and one of its gradient
        return _in_one_pass(diagonals, z, back)
    return _Across.apply(diagonals, z, back)


def _in_one_pass(diagonals: Tensor, z: Tensor, back: bool) -> Tensor:
    """The same without a gradient of its own: the slow twin."""
    d = len(diagonals) // 2
    total = z * diagonals[d]
    for o in range(1, d + 1):
        up, down = diagonals[d + o], diagonals[d - o]
        if back:
            total = total + _moved(z * up, -o) + _moved(z * down, o)
        else:
            total = total + _moved(z, o) * up + _moved(z, -o) * down
    return total


def _moved(z: Tensor, by: int) -> Tensor:
    """z[i + by] at i, zero from outside."""
    return F.pad(z, (-by, by))


class _Across(torch.autograd.Function):
    """yᵀC z is linear in each of the three: the derivatives are this again, and ``_Entries``."""

    @staticmethod
    def forward(diagonals: Tensor, z: Tensor, back: bool) -> Tensor:
        d = len(diagonals) // 2
        out = z * diagonals[d]
        for o in range(1, d + 1):
            up, down = diagonals[d + o][..., :-o], diagonals[d - o][..., o:]  # C[i, i + o], C[i, i − o]
            first, last = z[..., :-o], z[..., o:]
            if back:
                out[..., o:].addcmul_(first, up)
                out[..., :-o].addcmul_(last, down)
            else:
                out[..., :-o].addcmul_(last, up)
                out[..., o:].addcmul_(first, down)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        diagonals, z, ctx.back = inputs
        ctx.save_for_backward(diagonals, z)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:  # type: ignore[override]
        return torch.vmap(_in_one_pass, in_dims)(*inputs), 0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        diagonals, z = ctx.saved_tensors
        y, x = (z, grad) if ctx.back else (grad, z)
        return (
            _Entries.apply(y, x, tuple(diagonals.shape)) if ctx.needs_input_grad[0] else None,
            _Across.apply(diagonals, grad, not ctx.back) if ctx.needs_input_grad[1] else None,
            None,
        )


class _Entries(torch.autograd.Function):
    """The entries of y xᵀ that are in a band, summed over all vectors: the gradient of C in yᵀC x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        d, r = shape[0] // 2, shape[-1]
        return torch.stack([_diagonal(y, x, o, (*shape[1:-1], r - abs(o))) for o in range(-d, d + 1)])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        y, x, _ = inputs
        ctx.save_for_backward(y, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        y, x = ctx.saved_tensors
        return (
            _Across.apply(grad, x, False) if ctx.needs_input_grad[0] else None,
            _Across.apply(grad, y, True) if ctx.needs_input_grad[1] else None,
            None,
        )


def _diagonal(y: Tensor, x: Tensor, o: int, size: tuple[int, ...]) -> Tensor:
    """The entries (i, i + o) of y xᵀ."""
    sums = (y.narrow(-1, max(-o, 0), size[-1]) * x.narrow(-1, max(o, 0), size[-1])).sum_to_size(size)
    return F.pad(sums, (max(-o, 0), max(o, 0)))
