"""The names, shapes and orientation of RWKV's tensors: the official layout, and those of its implementations.

Official is what BlinkDL's ``.pth`` files have: ``blocks.0.att.receptance.weight``, ``blocks.0.att.w1``, … The same are
``rwkv.blocks.0.attention.receptance.weight`` in transformers, and ``model.layers.0.attn.r_proj.weight`` and
``model.layers.0.attn.w_lora.lora.0.weight`` in rwkv7-hf and flash-linear-attention. rwkv-simple has the official names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from svdpeft.registry import near_miss
from svdpeft.sites.place import is_factor

KEPT = "_svdpeft_rwkv"  # plain attribute of a model: the layout of the file that filled it
PARTS = {  # of a name: the implementations' words for the official ones
    **{"embeddings": "emb", "layers": "blocks", "norm": "ln_out", "lm_head": "head"},
    **{"attention": "att", "attn": "att", "feed_forward": "ffn"},
    **{"pre_ln": "ln0", "pre_norm": "ln0", "attn_norm": "ln1", "ffn_norm": "ln2", "g_norm": "ln_x"},
    **{"r_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "output"},
    **{"time_mix_key": "time_mix_k", "time_mix_value": "time_mix_v", "time_mix_receptance": "time_mix_r"},
}
PAIR = re.compile(r"([wavg])_lora\.(lora\.\d\.\w+)$")  # RWKV-7's low-rank pairs, where they are linear layers
PAIR_PARTS = {"lora.0.weight": "1", "lora.2.weight": "2", "lora.2.bias": "0"}
MATRIX = re.compile(r"\.att\.[wavg][12]$")  # (in, out) in the file, (out, in) in a linear layer
VECTOR = re.compile(r"\.(att|ffn)\.(x_[a-z]|[wav]0|k_k|k_a)$")  # RWKV-7: (1, 1, width) in the file
UNUSED = re.compile(r"blocks\.0\.att\.v[012]$")  # RWKV-7: the first layer mixes no earlier value; some files have them


class Layout(NamedTuple):
    """Shapes of a file's tensors, in its order, and those of its tensors for which the model has no place."""

    shapes: Mapping[str, torch.Size]
    unused: Mapping[str, Tensor]


def official_name(key: str) -> str:
    """Return the official name of a parameter of any implementation.

    Example:
        >>> official_name("model.layers.3.attn.w_lora.lora.0.weight"), official_name("blocks.3.att.w1")
        ('blocks.3.att.w1', 'blocks.3.att.w1')
    """
    name = PAIR.sub(lambda match: match[1] + PAIR_PARTS[match[2]], key)
    parts = name.removeprefix("rwkv.").removeprefix("model.").split(".")
    return ".".join(PARTS.get(part, part) for part in parts)


def names(model: nn.Module) -> dict[str, str]:
    """Return official name -> name in the model's state_dict, without the tensors of adapters."""
    return {official_name(key): key for key in model.state_dict() if not is_factor(key)}


def from_official(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file under the model's own names and in its shapes (views where possible).

    Raises:
        ValueError: a tensor is missing, has no place, or does not fit.
    """
    here, places, tensors = names(model), model.state_dict(), {}
    for name in [*here, *state]:
        if (name not in state or name not in here) and not UNUSED.match(name):
            where, there = ("checkpoint", state) if name in here else (type(model).__name__, here)
            raise ValueError(f"the {where} has no {name}: {near_miss(name, there)}")
    for name in [name for name in here if name in state]:
        key = here[name]
        value = state[name].mT if _turned(name, key) else state[name]
        if value.squeeze().shape != places[key].squeeze().shape:
            shapes = f"{tuple(value.shape)} in the checkpoint, {tuple(places[key].shape)} in {type(model).__name__}"
            raise ValueError(f"{name} is {shapes} ({key})")
        tensors[key] = value.reshape(places[key].shape)
    return tensors


def to_official(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model (views where possible) as the file had them that filled it.

    Without such a file the shapes are those of the official training code.
    """
    kept: Layout = vars(model).get(KEPT) or Layout({}, {})
    places, found = model.state_dict(), dict(kept.unused)
    for name, key in names(model).items():
        value = places[key].mT if _turned(name, key) else places[key]
        official = (1, 1, value.numel()) if VECTOR.search(name) else value.shape
        found[name] = value.reshape(kept.shapes.get(name, official))
    order = [name for name in kept.shapes if name in found]
    return {name: found[name] for name in dict.fromkeys([*order, *found])}


def keep(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Remember on the model how the file was laid out that filled it."""
    here = names(model)
    unused = {name: value.clone() for name, value in state.items() if name not in here}
    setattr(model, KEPT, Layout({name: value.shape for name, value in state.items()}, unused))


def _turned(name: str, key: str) -> bool:
    return bool(MATRIX.search(name)) and key.endswith(".weight")
