"""Fused projections: several matrices stacked in one weight, and the part of a kind that is some of its rows.

An SVD of a stack is not the stack of SVDs, so ``targets=["qkv[q,v]"]`` adapts each part with factors of its own. The
order of the rows is the model's: one projection after the other, or head by head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svdpeft.decomposition import Product
from svdpeft.layers.base import CalledKind, Example, LayerKind, Rows, dotted

STACKED = {  # name of the layer -> its parts, equally large and one after the other
    "qkv": ("q", "k", "v"),
    "Wqkv": ("q", "k", "v"),
    "c_attn": ("q", "k", "v"),
    "query_key_value": ("q", "k", "v"),
    "qkv_proj": ("q", "k", "v"),
    "kv": ("k", "v"),
    "gate_up_proj": ("gate", "up"),
}
HEADWISE = ("query_key_value",)  # q, k, v of the first head, then of the second (GPT-NeoX, BLOOM, Persimmon)
HEAD_SIZE = ("head_size", "head_dim", "dim_head")
# Head by head though the name says otherwise: class of the parent -> its attributes with the sizes of the parts.
HEADWISE_PARENTS = {
    "timm.models.tiny_vit.Attention": ("key_dim", "key_dim", "val_dim"),
    "timm.models.efficientformer.Attention": ("key_dim", "key_dim", "val_dim"),
    "timm.layers.halo_attn.HaloAttn": ("dim_head_qk", "dim_head_v"),
    "transformers.models.gpt_bigcode.modeling_gpt_bigcode.GPTBigCodeAttention": ("head_dim",) * 3,
}


def parts_of(kind: LayerKind, module: nn.Module, parameter: str, leaf: str, parent: Any) -> dict[str, Rows]:
    """Return the parts of a fused weight as rows of its matrix; empty where the order of the rows is not known.

    Args:
        kind: of the layer.
        module: the layer.
        parameter: that holds the weight.
        leaf: the layer's name in its parent ("qkv").
        parent: the module that calls the layer, whose attributes say how many heads there are.
    """
    known = kind.parts(module, parameter)
    if known or leaf not in STACKED:
        return known
    *batch, m, n = kind.to_matrix(module, module._parameters[parameter]).shape  # type: ignore[arg-type]
    names = STACKED[leaf]
    if batch and batch != [1]:
        return {}
    if leaf == "qkv_proj":
        return _grouped(parent, m)
    if leaf == "c_attn" and m == 2 * n:  # cross attention in GPT-2
        names = ("k", "v")
    if (attributes := HEADWISE_PARENTS.get(dotted(type(parent)))) is not None:
        if getattr(parent, "multi_query", False):
            return {}
        return _headwise(names, m, [getattr(parent, attribute) for attribute in attributes])
    if m != n * len(names) and leaf != "gate_up_proj":  # heads of other sizes: an order that is not known here
        return {}
    if leaf in HEADWISE or getattr(parent, "head_first", False):
        size = next((getattr(parent, a) for a in HEAD_SIZE if isinstance(getattr(parent, a, None), int)), None)
        return {} if size is None else _headwise(names, m, [size] * len(names))
    step = m // len(names)
    return {name: ((i * step, (i + 1) * step, 1),) for i, name in enumerate(names)}


def _headwise(names: tuple[str, ...], m: int, sizes: Sequence[int]) -> dict[str, Rows]:
    group, found = sum(sizes), {}
    for i, name in enumerate(names):
        start = sum(sizes[:i])
        found[name] = tuple((head + start, head + start + sizes[i], 1) for head in range(0, m, group))
    return found


def _grouped(parent: Any, m: int) -> dict[str, Rows]:
    """Phi-3: all query heads, then the fewer key heads, then as many value heads."""
    size, heads = getattr(parent, "head_dim", None), getattr(parent, "num_key_value_heads", None)
    if type(parent).__name__ not in ("Phi3Attention", "Phi4MultimodalAttention") or size is None or heads is None:
        return {}
    q = m - 2 * heads * size
    return {"q": ((0, q, 1),), "k": ((q, q + heads * size, 1),), "v": ((q + heads * size, m, 1),)}


class Part(CalledKind):
    """Some rows of the matrices of another kind.

    Args:
        whole: the kind of the layer.
        rows: which rows.
        total: number of rows of the whole matrix.
    """

    def __init__(self, whole: LayerKind, rows: Sequence[Sequence[int]], total: int) -> None:
        self.whole, self.total = whole, total
        self.rows: Rows = tuple((start, stop, step) for start, stop, step in rows)
        self.name = whole.name  # type: ignore[misc]
        self.multiplies = False  # type: ignore[misc]
        self.linear = whole.linear  # type: ignore[misc]
        self.sees = whole.sees  # type: ignore[misc]

    def called(self, module: nn.Module) -> bool:
        return self.whole.called(module)

    def to_matrix(self, module: nn.Module, w: Tensor) -> Tensor:
        w = self.whole.to_matrix(module, w)
        if len(self.rows) == 1:  # a view
            start, stop, step = self.rows[0]
            return w[..., start:stop:step, :]
        return torch.cat([w[..., start:stop:step, :] for start, stop, step in self.rows], -2)

    def from_matrix(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return self.whole.from_matrix(module, self._among_zeros(matrix))

    def apply(self, module: nn.Module, x: Tensor, product: Product) -> Tensor:
        return self._layer.apply(module, x, self._widen(product))

    def run(self, module: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        return self._layer.run(module, x, w)

    def run_like(self, module: nn.Module, x: Tensor, w: Tensor, out: Tensor) -> Tensor:
        return self._layer.run_like(module, x, w, out)

    def run_whole(self, module: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        out = self._layer.run_whole(module, x, w)
        mine = self.per_row(module, x, out.new_ones(sum(len(range(*rows)) for rows in self.rows)))
        return out if mine is None else out * mine

    def per_row(self, module: nn.Module, x: Tensor, values: Tensor) -> Tensor | None:
        return self._layer.per_row(module, x, self._among_zeros(values.unsqueeze(-1)).squeeze(-1))

    def add_bias(self, module: nn.Module, out: Tensor) -> Tensor:
        return self._layer.add_bias(module, out)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return self._layer.inputs(module, x)

    def add(self, module: nn.Module, x: Tensor, out: Tensor, product: Product) -> Tensor:
        return self._layer.add(module, x, out, self._widen(product))

    def add_dense(self, module: nn.Module, x: Tensor, out: Tensor, product: Product) -> Tensor:
        return self._layer.add_dense(module, x, out, self._widen(product))

    def spread(self, out: Tensor) -> Tensor:
        """The outputs of these rows, (..., rows), among zeros for all others, (..., total)."""
        return self._among_zeros(out.unsqueeze(-1)).squeeze(-1)

    @property
    def _layer(self) -> CalledKind:
        assert isinstance(self.whole, CalledKind), "only a layer that is called has an output to add to"
        return self.whole

    def _widen(self, product: Product) -> Product:
        # L of the whole layer, zero in the other rows: one thin product more per token than a slice of the output
        # would cost, and right for every kind.
        return product._replace(L=self._among_zeros(product.L))

    def _among_zeros(self, part: Tensor) -> Tensor:
        """(*b, rows, n) -> (*b, total, n)."""
        if len(self.rows) == 1 and self.rows[0][2] == 1:
            start, stop, _ = self.rows[0]
            return F.pad(part, (0, 0, start, self.total - stop))
        whole = part.new_zeros(*part.shape[:-2], self.total, part.shape[-1])
        at = 0
        for start, stop, step in self.rows:
            count = len(range(start, stop, step))
            whole[..., start:stop:step, :] = part[..., at : at + count, :]
            at += count
        return whole

    def examples(self) -> list[Example]:
        return []  # of the kinds that it is a part of
