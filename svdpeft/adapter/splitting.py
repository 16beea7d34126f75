"""A layer that reads its weights, in a batch whose rows use different adapters: its call is made once per adapter.

W' = W0 + ΔW is one matrix for a whole call, so each adapter's rows are taken out of the inputs, computed with that
adapter alone, and put back in their places. The work on the inputs is the same; what is added is one W' per adapter.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from svdpeft.layers.base import only_tensor
from svdpeft.sites.rows import Rows
from svdpeft.sites.scope import scope, within
from svdpeft.sites.site import Site
from svdpeft.targets.inventory import kind_of

Groups = Sequence[tuple[Rows, set[Site]]]
_installing = threading.Lock()
PLAIN = (type(None), bool, int, float, str)  # arguments that are the same for every row


@contextmanager
def split(model: nn.Module, groups: Groups, placed: Sequence[Site]) -> Iterator[None]:
    """Within the block every layer that reads weights of some of the sites is called once for each group of rows.

    Args:
        model: whose forward will be called.
        groups: the rows of each adapter, and of the base, with the sites that act on them: every row is in one.
        placed: all sites of the model.
    """
    named = {site for _, sites in groups for site in sites}
    found: dict[_Split, Any] = {}
    try:
        for reader, certain in _readers(model, named).items():
            inside = set(reader.modules())
            sites = [site for site in placed if not inside.isdisjoint(site.owners)]
            found[_Split.into(reader)] = groups, sites, certain
        with within(found):
            yield
    finally:
        for each in found:
            each.leave()


def _readers(model: nn.Module, sites: set[Site]) -> dict[nn.Module, bool]:
    """The layers in whose own call weights are read, those that have them or those around these; and whether that is
    certain. A layer that is called may have been read by somebody who looks at weights and computes nothing."""
    around: dict[nn.Module, list[nn.Module]] = {}
    for module in model.modules():
        for child in module.children():
            around.setdefault(child, []).append(module)
    found: dict[nn.Module, bool] = {}
    for site in sites:
        for place in site.places:
            owner = place.module
            never_called = isinstance(owner, nn.modules.linear.NonDynamicallyQuantizableLinear)
            if not place.can_call and not never_called:
                found[owner] = True
            elif never_called or place.was_read:
                for reader in around.get(owner, ()):
                    found[reader] = found.get(reader, False) or never_called
    return found


class _Split:
    """Stands in the place of a layer's ``forward``, and does what the block of the caller says.

    That is: the rows of each adapter, and of the base, with their sites; the sites of the layer and of what is in it;
    whether it is certain that it reads their weights, else its call goes on as it is where it cannot be split.

    Args:
        layer: that reads weights.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.forward, self.own = layer, layer.forward, vars(layer).get("forward")
        self.signature = inspect.signature(layer.forward)
        self.blocks = 0  # of whatever threads

    @classmethod
    def into(cls, layer: nn.Module) -> _Split:
        """Put one in the place, unless a block of another thread has."""
        with _installing:
            if not isinstance(there := vars(layer).get("forward"), cls):
                vars(layer)["forward"] = there = cls(layer)
            there.blocks += 1
            return there

    def leave(self) -> None:
        """Give the layer its own forward back when the last block ends."""
        with _installing:
            self.blocks -= 1
            if self.blocks:
                return
            del vars(self.layer)["forward"]
            if self.own is not None:
                vars(self.layer)["forward"] = self.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        here = scope() or {}
        groups, sites, certain = here.get(self, ((), (), False))
        acting = [site for site in sites if isinstance(here.get(site), Rows)]
        if not acting:  # in the call of a layer around it, which is split, or of another thread
            return self.forward(*args, **kwargs)
        given = self.signature.bind(*args, **kwargs)
        tensors = {name: value for name, value in given.arguments.items() if isinstance(value, Tensor)}
        kind = next((kind for name in self.layer._parameters if (kind := kind_of(self.layer, name))), None)
        names = only_tensor(tensors) if kind is None else kind.per_example(self.layer, tensors)
        other = [name for name, value in given.arguments.items() if not isinstance(value, (Tensor, *PLAIN))]
        if names is None or other:
            if not certain:
                return self.forward(*args, **kwargs)
            if len(groups) > 1 and not other:
                raise self._refusal(
                    acting, f"of its inputs {', '.join(tensors)} it is not known which have a row per example"
                )
            if len(groups) > 1:
                raise self._refusal(acting, f"its input {other[0]} is a {type(given.arguments[other[0]]).__name__}")
            return self._with(sites, groups[0][1], args, kwargs)
        outputs, taken = [], []
        for rows, its in groups:
            mine = {name: rows.of(type(self.layer).__name__, tensors[name], tensors[name]) for name in names}
            if len(groups) == 1:  # all rows, whose number has been looked at
                return self._with(sites, its, args, kwargs)
            parts = {name: tensors[name].index_select(0, at) for name, at in mine.items() if at is not None}
            arguments = inspect.BoundArguments(self.signature, {**given.arguments, **parts})  # type: ignore[arg-type]
            outputs.append(self._with(sites, its, arguments.args, arguments.kwargs))
            taken.append(mine[names[0]])
        return self._together(acting, outputs, taken, torch.cat(taken).argsort())

    def _with(self, sites: Sequence[Site], its: set[Site], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the layer with some of its sites on all rows that it is given, and no others."""
        with within({site: site in its for site in sites}):
            return self.forward(*args, **kwargs)

    def _together(self, acting: Sequence[Site], parts: Sequence[Any], taken: Sequence[Tensor], order: Tensor) -> Any:
        """The outputs of all groups, every row where it belongs."""
        first = parts[0]
        if isinstance(first, Tensor):
            if any(part.ndim == 0 or len(part) != len(at) for part, at in zip(parts, taken, strict=True)):
                raise self._refusal(acting, "one of its outputs does not have a row for each example")
            return torch.cat(list(parts)).index_select(0, order)
        if isinstance(first, (tuple, list)):
            found = [self._together(acting, each, taken, order) for each in zip(*parts, strict=True)]
            return type(first)(*found) if hasattr(first, "_fields") else type(first)(found)  # a named tuple
        if isinstance(first, PLAIN) and all(part == first for part in parts):
            return first
        raise self._refusal(acting, f"one of its outputs is a {type(first).__name__}")

    def _refusal(self, acting: Sequence[Site], why: str) -> RuntimeError:
        names = ", ".join(site.name for site in acting)
        return RuntimeError(
            f"{type(self.layer).__name__} reads the weight of {names}, so that per_example() has to call it once per "
            f"adapter, and {why}; leave it out of the adapter"
        )
