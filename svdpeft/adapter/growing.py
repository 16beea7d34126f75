"""A base with fewer tokens than an adapter was made with: it gets the rows that the adapter has values for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdpeft.adapter.file import CheckpointError, method_in
from svdpeft.adapter.roster import adapted, claimed
from svdpeft.layers.part import ranges_in
from svdpeft.methods.base import PerSite
from svdpeft.sites.shards import shape_of

SIZES = ("num_embeddings", "out_features")  # attributes of layers that say their number of tokens


class Growth:
    """Within the block the embeddings of a model of transformers have more rows; an error takes that back.

    A new row is the mean of the others, which no prediction prefers.

    Args:
        model: with ``resize_token_embeddings``.
        ends: its layers with a row for every token: the embedding, and the output layer where there is one.
        old: their number of tokens.
        new: the adapter's.
    """

    def __init__(self, model: Any, ends: list[nn.Module], old: int, new: int) -> None:
        self.model, self.ends, self.old, self.new = model, ends, old, new

    @classmethod
    def of(
        cls, model: nn.Module, header: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
    ) -> Growth | None:
        """What a model lacks for an adapter, or ``None``.

        Args:
            model: that it will be attached to.
            header: of the adapter.
            tensors: of the adapter.
            path: of the adapter, for messages.

        Raises:
            CheckpointError: new rows of which the adapter does not have all values, embeddings that another adapter
                has, an adapter that was made with fewer tokens.
        """
        ends = _ends(model)
        if not ends or not callable(getattr(model, "resize_token_embeddings", None)):
            return None
        names = {id(module): name for name, module in model.named_modules()}
        found: dict[int, tuple[str, nn.Parameter, set[int]]] = {}  # a tied one is given under any of its names
        old, new = 0, 0
        for end in ends:
            for key, parameter in end._parameters.items():
                if parameter is None:
                    continue
                name = f"{names[id(end)]}.{key}"
                size, given = _given(name, parameter, header, tensors, path)
                found.setdefault(id(parameter), (name, parameter, set()))[2].update(given)
                old, new = max(old, len(parameter)), max(new, size if given else 0)
        if not new or new == old:
            return None
        if new < old:
            raise CheckpointError(
                f"{path} was made with {new} tokens, and this base has {old}: "
                f"model.resize_token_embeddings({new}) first"
            )
        held = {**{key: site.name for key, site in adapted().items()}, **claimed()}
        for key, (name, _, given) in found.items():
            if missing := set(range(old, new)) - given:
                layer, _, parameter = name.rpartition(".")
                way = f"{{{layer!r}: range({old}, {new})}}" if parameter == "weight" else f"[{name!r}]"
                raise CheckpointError(
                    f"{path} was made with {new} tokens, and this base has {old}; the adapter has no values for row "
                    f"{min(missing)} of {name}. Train what is new, train={way}, or give the base the rows that it had "
                    f"then, by model.resize_token_embeddings({new})"
                )
            if key in held:
                raise CheckpointError(
                    f"{path} was made with {new} tokens, and {name}, of {old}, has an adapter already, as {held[key]}: "
                    "adapters of different numbers of tokens cannot share a base"
                )
        return cls(model, ends, old, new)

    def __enter__(self) -> None:
        self.before = [
            (end, dict(end._parameters), {k: vars(end)[k] for k in SIZES if k in vars(end)}) for end in self.ends
        ]
        self.values = {p: p.data for _, parameters, _ in self.before for p in parameters.values() if p is not None}
        try:
            self._resize(self.new)
            for end, now in zip(self.ends, _ends(self.model), strict=True):
                if now is not end:  # transformers puts a new output layer in the place of one that is not tied
                    end._parameters.update(now._parameters)
                    vars(end).update({k: vars(now)[k] for k in SIZES if k in vars(now)})
            self._put_back()
            for end, parameters, _ in self.before:
                for key, parameter in end._parameters.items():
                    if parameter is not None and (was := parameters[key]) is not None:
                        parameter.data[self.old :] = parameter.data[: self.old].float().mean(0)
                        parameter.requires_grad_(was.requires_grad)
        except BaseException:
            self._undo()
            raise

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._undo()

    def _undo(self) -> None:
        self._resize(self.old)  # what the configuration says, too
        for end, parameters, sizes in self.before:
            end._parameters.update(parameters)
            vars(end).update(sizes)
        for parameter, data in self.values.items():
            parameter.data = data
        self._put_back()

    def _put_back(self) -> None:
        self.model.set_input_embeddings(self.ends[0])
        if len(self.ends) > 1:
            self.model.set_output_embeddings(self.ends[1])

    def _resize(self, tokens: int) -> None:
        devices = {p.device.index for end in self.ends for p in end.parameters(recurse=False) if p.is_cuda}
        with torch.random.fork_rng(sorted(devices)):  # it draws what is overwritten
            self.model.resize_token_embeddings(tokens, mean_resizing=False)


def _ends(model: Any) -> list[nn.Module]:
    """The layers of a model that have a row for every token."""
    found = []
    for end in ("input", "output"):
        try:
            layer = getattr(model, f"get_{end}_embeddings")()
        except (AttributeError, NotImplementedError, TypeError):  # it has none, or means something else by the name
            layer = None
        if isinstance(layer, nn.Module) and isinstance(layer._parameters.get("weight"), nn.Parameter):
            found.append(layer)
        elif end == "input":
            return []
    return found


def _given(
    name: str, here: Tensor, header: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> tuple[int, set[int]]:
    """How many rows a parameter had, as far as an adapter knows it, and of which of them the adapter has values.

    What a file says of its size is believed as far as there are values for it: the model will have as many rows.
    """
    width = math.prod(shape_of(here)[1:])
    if name in header["whole"]:
        if tuple(tensors[name].shape[1:]) != shape_of(here)[1:]:
            return 0, set()  # refused where it is held against the model
        return len(tensors[name]), set(range(len(tensors[name])))
    size, rows = 0, set[int]()
    for site, entry in header["sites"].items():
        if any(f"{place['layer']}.{place['parameter']}" == name for place in entry["places"]):
            size, method = entry["shape"][0], method_in(entry["method"], path)
            if isinstance(method, PerSite) and not method.depends_on_base:
                whole = {"of": size, "ranges": [[0, size, 1]]}
                ranges = [range(*each) for each in ranges_in(whole if entry["part"] is None else entry["part"])]
                values = sum(t.numel() for key, t in tensors.items() if key.rpartition("/")[0] == site)
                if sum(map(len, ranges)) * width > values:
                    raise CheckpointError(f"{path} has {values} values at {site}, too few for rows of {width}")
                rows |= {row for each in ranges for row in each}
    return size, rows
