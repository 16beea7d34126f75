"""A base with fewer tokens than an adapter was made with: it gets the rows that the adapter has values for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdpeft.adapter.file import CheckpointError, method_in
from svdpeft.adapter.roster import adapted, claimed
from svdpeft.methods.base import PerSite


@contextmanager
def grown(model: nn.Module, header: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Iterator[None]:
    """Resize the embeddings of a model of transformers, where an adapter is for more tokens; an error takes it back.

    Args:
        model: that it will be attached to. Its new rows are zeros: what they are does not matter.
        header: of the adapter.
        tensors: of the adapter.
        path: of the adapter, for messages.

    Raises:
        CheckpointError: new rows of which the adapter does not have all values, embeddings that another adapter has.
    """
    weights = _weights(model)
    old = max((len(weight) for weight in weights.values()), default=0)
    given = {name: _given(name, header, tensors, path) for name in weights}
    new = max((size for size, _ in given.values()), default=0)
    if new <= old or not callable(getattr(model, "resize_token_embeddings", None)):
        yield
        return
    by_weight: dict[int, set[int]] = {}  # a tied one is given under any of its names
    for name, weight in weights.items():
        by_weight.setdefault(id(weight), set()).update(given[name][1])
    for name, weight in weights.items():
        if missing := set(range(old, new)) - by_weight[id(weight)]:
            raise CheckpointError(
                f"{path} was made with {new} tokens, and this base has {old}; the adapter has no values for row "
                f"{min(missing)} of {name}. Train new rows, by train={{{name.removesuffix('.weight')!r}: range({old}, "
                f"{new})}}, or give the base the rows that it had then, by model.resize_token_embeddings({new})"
            )
        if id(weight) in (held := {**adapted(), **claimed()}):
            raise CheckpointError(
                f"{path} was made with {new} tokens, and {name}, of {old}, has an adapter already: {held[id(weight)]}; "
                "detach that, load this one, then that"
            )
    flags = {name: weight.requires_grad for name, weight in weights.items()}
    _resize(model, new)
    try:
        for name, weight in _weights(model).items():
            weight.data[old:] = 0
            weight.requires_grad_(flags[name])
        yield
    except BaseException:
        _resize(model, old)
        raise


def _resize(model: Any, tokens: int) -> None:
    devices = {weight.device for weight in _weights(model).values() if weight.is_cuda}
    with torch.random.fork_rng(sorted(device.index for device in devices)):  # it draws what is overwritten
        model.resize_token_embeddings(tokens, mean_resizing=False)


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the layers that have a row for every token, by name; a tied one by all its names."""
    ends = []
    for end in ("input", "output"):
        with suppress(NotImplementedError):  # transformers' answer where it does not find them: RWKV's
            ends.append(getattr(model, f"get_{end}_embeddings", lambda: None)())
    layers = {id(layer) for layer in ends if isinstance(layer, nn.Module)}
    found = ((f"{name}.weight", module) for name, module in model.named_modules() if id(module) in layers)
    return {name: weight for name, m in found if isinstance(weight := m._parameters.get("weight"), nn.Parameter)}


def _given(name: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> tuple[int, set[int]]:
    """How many rows a weight had, as far as an adapter knows it, and of which of them the adapter has values."""
    if name in header["whole"]:
        return len(tensors[name]), set(range(len(tensors[name])))
    size, rows = 0, set[int]()
    for entry in header["sites"].values():
        if any(f"{place['layer']}.{place['parameter']}" == name for place in entry["places"]):
            size, method = entry["shape"][0], method_in(entry["method"], path)
            if isinstance(method, PerSite) and not method.depends_on_base:
                ranges = [(0, size, 1)] if entry["part"] is None else entry["part"]["ranges"]
                rows |= {row for each in ranges for row in range(*each)}
    return size, rows
