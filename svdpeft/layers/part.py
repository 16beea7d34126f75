"""The part of a layer kind that is some rows of its matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svdpeft.decomposition import Product
from svdpeft.layers.base import CalledKind, LayerKind, Ranges
from svdpeft.layers.view import View


class Part(View):
    """Some rows of the matrices of another kind.

    Args:
        whole: the kind of the layer.
        rows: which rows.
        total: number of rows of the whole matrix.
    """

    word = "part"

    def __init__(self, whole: LayerKind, rows: Sequence[Sequence[int]], total: int) -> None:
        super().__init__(whole)
        self.total = total
        self.rows: Ranges = tuple((start, stop, step) for start, stop, step in rows)
        self._known: dict[torch.device, Tensor] = {}
        self.name = whole.name
        self.linear = whole.linear
        self.sees = whole.sees
        self.bands = isinstance(whole, CalledKind) and whole.bands

    def fields(self) -> dict[str, Any]:
        return {"of": self.total, "ranges": [list(rows) for rows in self.rows]}

    @classmethod
    def of(cls, whole: LayerKind, fields: Mapping[str, Any]) -> Part:
        return cls(whole, ranges_in(fields), fields["of"])

    def to_matrix(self, module: nn.Module, w: Tensor) -> Tensor:
        w = self.whole.to_matrix(module, w)
        if len(self.rows) == 1:  # a view
            start, stop, step = self.rows[0]
            return w[..., start:stop:step, :]
        return w.index_select(-2, self._positions(w.device))

    def from_matrix(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return self.whole.from_matrix(module, self._among_zeros(matrix))

    def widen(self, product: Product) -> Product:
        # L of the whole layer, zero in the other rows: one thin product more per token than a slice of the output
        # would cost, and right for every kind.
        return product._replace(L=self._among_zeros(product.L))

    def apply(self, module: nn.Module, x: Tensor, product: Product) -> Tensor:
        return self._layer.apply(module, x, self.widen(product))

    def run_like(self, module: nn.Module, x: Tensor, w: Tensor, out: Tensor) -> Tensor:
        return self._layer.run_like(module, x, w, out)

    def run_whole(self, module: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        out = self._layer.run_whole(module, x, w)
        mine = self.per_row(module, x, out.new_ones(len(self._positions(out.device))))
        return out if mine is None else out * mine

    def per_row(self, module: nn.Module, x: Tensor, values: Tensor) -> Tensor | None:
        return self._layer.per_row(module, x, self._among_zeros(values.unsqueeze(-1)).squeeze(-1))

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return self._layer.inputs(module, x)

    def add(self, module: nn.Module, x: Tensor, out: Tensor, product: Product) -> Tensor:
        return self._layer.add(module, x, out, self.widen(product))

    def add_matrix(self, module: nn.Module, x: Tensor, out: Tensor, matrix: Tensor) -> Tensor:
        return self._layer.add_rows(module, x, out, matrix, self._positions(matrix.device), self.total)

    def narrow(self, out: Tensor) -> Tensor:
        if len(self.rows) == 1:  # a view
            start, stop, step = self.rows[0]
            return out[..., start:stop:step]
        return out.index_select(-1, self._positions(out.device))

    def spread(self, out: Tensor) -> Tensor:
        return self._among_zeros(out.unsqueeze(-1)).squeeze(-1)

    def _among_zeros(self, part: Tensor) -> Tensor:
        """(*b, rows, n) -> (*b, total, n)."""
        if len(self.rows) == 1 and self.rows[0][2] == 1:
            start, stop, _ = self.rows[0]
            return F.pad(part, (0, 0, start, self.total - stop))
        whole = part.new_zeros(*part.shape[:-2], self.total, part.shape[-1])
        return whole.index_copy(-2, self._positions(part.device), part)

    def _positions(self, device: torch.device) -> Tensor:
        """Which rows, as numbers, copied to a device once."""
        if device in self._known:
            return self._known[device]
        with torch.inference_mode(False):  # a tensor of that mode could not be in a graph later on
            found = torch.tensor([row for rows in self.rows for row in range(*rows)], device=device)
        if not torch.compiler.is_compiling() and type(found) is Tensor:  # and no stand-in of a tracing mode
            self._known[device] = found
        return found


def ranges_in(fields: Mapping[str, Any]) -> Ranges:
    """The rows that a file says, checked before anything is made of them.

    Args:
        fields: as ``Part.fields`` gives them.

    Raises:
        ValueError: they are not (start, stop, step) ranges in ascending order, one after the other, within the matrix.

    Example:
        >>> ranges_in({"of": 6, "ranges": [[0, 2, 1], [4, 6, 1]]})
        ((0, 2, 1), (4, 6, 1))
    """
    total, found, last = fields["of"], [], 0
    for each in fields["ranges"]:
        if not isinstance(each, list) or [type(number) for number in each] != [int] * 3:
            raise ValueError(f"a part has the range {each!r}, which is not start, stop and step")
        start, stop, step = each
        if not (last <= start < stop <= total and step > 0):
            raise ValueError(f"a part has the range {each}, of {total} rows after row {last}")
        found.append((start, stop, step))
        last = stop
    return tuple(found)
