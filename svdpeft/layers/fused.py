"""Fused projections: several matrices stacked in one weight, and the part of a kind that is some of its rows.

An SVD of a stack is not the stack of SVDs, so ``targets=["qkv[q,v]"]`` adapts each part with factors of its own. The
order of the rows is the model's: one projection after the other, or head by head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from svdpeft.layers.base import LayerKind, Ranges, dotted
from svdpeft.layers.quantised import weight

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


def parts_of(kind: LayerKind, module: nn.Module, parameter: str, leaf: str, parent: Any) -> dict[str, Ranges]:
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
    *batch, m, n = kind.to_matrix(module, weight(module, parameter)).shape
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


def _headwise(names: tuple[str, ...], m: int, sizes: Sequence[int]) -> dict[str, Ranges]:
    group, found = sum(sizes), {}
    for i, name in enumerate(names):
        start = sum(sizes[:i])
        found[name] = tuple((head + start, head + start + sizes[i], 1) for head in range(0, m, group))
    return found


def _grouped(parent: Any, m: int) -> dict[str, Ranges]:
    """Phi-3: all query heads, then the fewer key heads, then as many value heads."""
    size, heads = getattr(parent, "head_dim", None), getattr(parent, "num_key_value_heads", None)
    if type(parent).__name__ not in ("Phi3Attention", "Phi4MultimodalAttention") or size is None or heads is None:
        return {}
    q = m - 2 * heads * size
    return {"q": ((0, q, 1),), "k": ((q, q + heads * size, 1),), "v": ((q + heads * size, m, 1),)}
