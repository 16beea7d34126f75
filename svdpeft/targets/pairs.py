"""Which weights of an attention belong together: query and key, value and output projection.

The logits of a head see W_Q and W_K as W_Qᵀ W_K alone, its output sees W_O W_V, as long as nothing stands between them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from svdpeft.layers.base import LayerKind
from svdpeft.layers.fused import parts_of
from svdpeft.layers.heads import Heads
from svdpeft.layers.part import Part
from svdpeft.layers.quantised import weight

SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"))
FUSED = ("qkv", "c_attn", "query_key_value", "qkv_proj", "Wqkv", "in_proj")
OUTPUT = ("o_proj", "out_proj", "proj", "c_proj", "dense", "out_lin", "o")
BESIDE = "output.dense"  # beside the module that holds query, key and value (BERT, ViT of transformers)
SIZE = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "dim_head")
COUNT = ("num_heads", "num_attention_heads", "n_heads", "n_head")
STAYS = "only the query and the output projection of a pair are changed"
UNKNOWN = "no projection of an attention that is known here, and the method works on pairs of them"
TURNS, SCALES = re.compile(r"rotary|rope|rot_emb|rot_pos"), re.compile(r"normalize|l2norm|logit_scale")


class Projection(NamedTuple):
    """One of the four projections of an attention."""

    module: nn.Module
    parameter: str
    part: str
    kind: LayerKind

    @property
    def size(self) -> torch.Size:
        """(rows, columns) of its matrix."""
        return self.kind.to_matrix(self.module, weight(self.module, self.parameter)).shape


class Half(NamedTuple):
    """A weight that is one half of a pair, and how both are shown head by head.

    Args:
        pair: ``"qk"``, of which this is the query, or ``"vo"``, of which this is the output projection.
        kind: of this weight.
        partner: the key, or the value, with as many heads as it has: each may serve several of the others.
    """

    pair: Literal["qk", "vo"]
    kind: Heads
    partner: Projection


Key = tuple[int, str, str]  # id of a layer, parameter, part
Kinds = Mapping[tuple[int, str], LayerKind]  # by id of a layer, and parameter


def halves(model: nn.Module, kinds: Kinds) -> dict[Key, Half | str]:
    """Find the attentions of a model: its projections, each as the half of a pair, or with the reason why it is none.

    Args:
        model: any module.
        kinds: of its weights.
    """
    found: dict[Key, Half | str] = {}
    modules = dict(model.named_modules())
    for name, parent in modules.items():
        for q, k, v, o in _projections(name, parent, modules, kinds):
            found[_key(k)] = found[_key(v)] = STAYS
            parts = name.split(".") if name else []
            above = [modules[".".join(parts[:i])] for i in range(len(parts), -1, -1)]
            config = next((c for c in (getattr(m, "config", None) for m in above) if c is not None), None)
            qk, vo = _between(parent, above, config, [p.module for p in (q, k, v, o) if p is not None])
            heads = _heads(parent, config, q.size[0])
            size = q.size[0] // heads if heads else 1
            groups = k.size[0] // size
            if not heads or k.size[0] % size or not groups or heads % groups or v.size[0] % groups:
                qk = vo = "it is not known how many heads it has"
            elif o is not None and o.size[1] != v.size[0] // groups * heads:
                vo = f"it takes {o.size[1]} values, where {heads} heads of {v.size[0] // groups} are known"
            key, value = (p._replace(kind=Heads(p.kind, max(groups, 1), "rows")) for p in (k, v))
            found[_key(q)] = qk or Half("qk", Heads(q.kind, heads, "rows"), key)
            if o is not None:
                found[_key(o)] = vo or Half("vo", Heads(o.kind, heads, "columns"), value)
    return found


def _key(p: Projection) -> Key:
    return id(p.module), p.parameter, p.part


def _projections(
    name: str, parent: nn.Module, modules: Mapping[str, nn.Module], kinds: Kinds
) -> Iterator[tuple[Projection, Projection, Projection, Projection | None]]:
    def at(module: nn.Module | None, parameter: str = "weight") -> Projection | None:
        kind = kinds.get((id(module), parameter))
        found = None if module is None or kind is None or not kind.linear else Projection(module, parameter, "", kind)
        return found if found is not None and len(found.size) == 2 else None

    children = parent._modules
    threes = [tuple(at(children.get(leaf)) for leaf in leaves) for leaves in SEPARATE]
    threes.append(tuple(at(parent, f"{part}_proj_weight") for part in "qkv"))
    fused = [(leaf, at(children.get(leaf))) for leaf in FUSED] + [("in_proj_weight", at(parent, "in_proj_weight"))]
    for leaf, whole in fused:
        if whole is not None:
            rows = parts_of(whole.kind, whole.module, whole.parameter, leaf, parent)
            if set("qkv") <= rows.keys():
                total = whole.size[0]
                threes.append(tuple(whole._replace(part=p, kind=Part(whole.kind, rows[p], total)) for p in "qkv"))
    beside = modules.get(f"{name.rpartition('.')[0]}.{BESIDE}".lstrip("."))
    output = next((o for o in (*(at(children.get(leaf)) for leaf in OUTPUT), at(beside)) if o is not None), None)
    for q, k, v in threes:
        if q is not None and k is not None and v is not None:
            yield q, k, v, output


def _heads(parent: nn.Module, config: Any, rows: int) -> int:
    """The number of heads, or 0 where it is not known, or where size and number do not agree."""
    size = next((s for s in (getattr(parent, a, None) for a in SIZE) if isinstance(s, int)), None)
    places = [(place, a) for place in (parent, config) for a in COUNT]
    count = next((c for c in (getattr(place, a, None) for place, a in places) if isinstance(c, int)), None)
    count = count or (rows // size if size else 0)
    return count if count and rows % count == 0 and (size is None or size * count == rows) else 0


def _between(
    parent: nn.Module, above: list[nn.Module], config: Any, known: list[nn.Module]
) -> tuple[str | None, str | None]:
    """Why query and key, and why value and output, cannot be multiplied: what the model does between them."""
    code = inspect.unwrap(type(parent).forward).__code__
    words = " ".join((*code.co_names, *code.co_varnames)).lower()
    qk = vo = None
    around = [type(child).__name__.lower() for module in above for child in module.children()]
    if config is not None:
        around += [a for a in ("rotary_dim", "rope_theta", "rope_parameters") if getattr(config, a, None) is not None]
    if any(TURNS.search(text) for text in (words, *around)):
        qk = "queries and keys are turned by their positions (rotary), so that their product is no one matrix"
    elif "relative_key" in str(getattr(config, "position_embedding_type", "")):
        qk = "queries are multiplied with positions as well as with keys"
    elif SCALES.search(words):
        qk = "queries and keys are normalised before they are multiplied"
    for name, child in parent.named_children():
        norm = "norm" in type(child).__name__.lower()
        if isinstance(child, nn.Embedding) or any(module in known for module in child.modules()):
            continue
        if norm or next(child.parameters(), None) is not None:
            what = "normalises" if norm else "may change"
            if name[:1] in "qk" or not norm:
                qk = qk or f"{name} {what} what is multiplied"
            if name[:1] not in "qk":
                vo = vo or f"{name} {what} what is multiplied"
                qk = qk or vo
    return qk, vo
