"""The reach check: which adapted weights a model reads instead of calling their layer, and which it never touches.

It watches the first eager forward of an adapted model. An operation that takes the weight of a layer which is not
running (``F.linear(x, self.qkv.weight)``) gets W0 + ΔW there and then, so that already this batch is right, and the
layer's class answers later reads. A site that the batch did not touch is named in a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map

from svdpeft.sites import Place, Site, adapted

WATCH = "_svdpeft_watch"  # plain attribute of a model whose first forward is awaited: its ``Watch``
SHOWN = 5  # names in a warning
# What asks about a tensor without computing with it.
ASKS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_contiguous", "__len__"}


class Watch:
    """The state of one check.

    Args:
        model: whose forward is watched.
        sites: gives the sites that must be reached.
    """

    def __init__(self, model: nn.Module, sites: Callable[[], Iterable[Site]]) -> None:
        self.model, self.sites = model, sites
        self.reads: _Reads | None = None
        self.handles = [
            model.register_forward_pre_hook(_begin, prepend=True),
            model.register_forward_hook(_end, always_call=True),
        ]

    def begin(self) -> None:
        """Watch from now on."""
        places = [place for site in self.sites() for place in site.places]
        for place in places:
            place.reached = False
        self.reads = _Reads(self.model, places)
        self.reads.open()

    def end(self) -> list[Site]:
        """Stop watching; serve the reads that were seen. Returns the sites that nobody touched."""
        assert self.reads is not None
        self.reads.close()
        read, self.reads = self.reads.read, None
        lost = [site for site in self.sites() if not site.reached]
        for site in self.sites():
            if site.method.dropout and read & set(site.places):
                raise RuntimeError(
                    f"dropout {site.method.dropout} at {site.name}: the model reads the weight instead of calling the "
                    "layer, so the adapter has no input of its own to drop; attach with dropout=0, or leave it out"
                )
            for place in site.places:
                # A weight that was not touched may be read where no operation of torch shows it (a fused kernel).
                if (place in read or not place.reached) and not place.read:
                    site.serve_reads(place)
        return lost

    def cancel(self) -> None:
        """Wait no longer."""
        if self.reads is not None:
            self.reads.close()
        for handle in self.handles:
            handle.remove()


def watch(model: nn.Module, sites: Callable[[], Iterable[Site]]) -> None:
    """Have the next eager forward of the model watched."""
    unwatch(model)
    setattr(model, WATCH, Watch(model, sites))


def unwatch(model: nn.Module) -> None:
    """Take the watch away, if there is one."""
    if WATCH in vars(model):
        getattr(model, WATCH).cancel()
        delattr(model, WATCH)


def _begin(model: Any, args: Any) -> None:
    if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        getattr(model, WATCH).begin()


def _end(model: Any, args: Any, out: Any) -> None:
    current: Watch | None = getattr(model, WATCH, None)
    if torch.compiler.is_compiling() or current is None or current.reads is None:
        return
    if out is None:  # the forward raised: the next one is watched
        current.reads.close()
        current.reads = None
        return
    lost = current.end()
    unwatch(model)
    if lost:
        names = ", ".join(site.name for site in lost[:SHOWN]) + (", …" if len(lost) > SHOWN else "")
        warnings.warn(
            f"{len(lost)} adapted weights were not touched by the first batch and do not train on it: {names} "
            "(adapter.unreached lists them)",
            stacklevel=2,
        )


class _Reads(TorchFunctionMode):
    """Sees every operation of torch; gives those that read an adapted weight W0 + ΔW."""

    def __init__(self, model: nn.Module, places: Sequence[Place]) -> None:
        super().__init__()
        self.running = [model]  # the layers whose forward has begun and not ended
        self.places: dict[int, list[Place]] = {}
        for place in places:
            if place.called and not place.read:
                self.places.setdefault(id(place.module._parameters[place.parameter]), []).append(place)
        self.read: set[Place] = set()

    def open(self) -> None:
        # Compiled parts of the model run as written for this batch: what they read would not be seen.
        self.stance = torch.compiler.set_stance("force_eager")
        self.handles = [
            nn.modules.module.register_module_forward_pre_hook(lambda module, args: self.running.append(module)),
            nn.modules.module.register_module_forward_hook(self._stop, always_call=True),
        ]
        self.__enter__()

    def close(self) -> None:
        self.__exit__(None, None, None)
        for handle in self.handles:
            handle.remove()
        self.stance.__exit__(None, None, None)

    def _stop(self, module: nn.Module, args: Any, out: Any) -> None:
        if self.running and self.running[-1] is module:
            self.running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not tree_any(self._is_read, (args, kwargs)):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ASKS or name == "__set__":
            return func(*args, **kwargs)
        if name == "__get__" and not isinstance(answer := func(*args, **kwargs), Tensor):
            return answer  # its dtype, its device
        args, kwargs = tree_map(self._adapt, (args, kwargs))
        return func(*args, **kwargs)

    def _is_read(self, value: Any) -> bool:
        places = self.places.get(id(value)) if isinstance(value, nn.Parameter) else None
        return places is not None and not any(place.module in self.running for place in places)

    def _adapt(self, value: Any) -> Any:
        if not self._is_read(value):
            return value
        places = self.places[id(value)]
        # A tied weight is one site with several places; two adapters, or two parts, are two sites.
        self.read.update(places)
        for place in places:
            place.reached = True
            place.site.use_base()  # what is read is the weight, and no factors alone
        by_site = {place.site: place for place in places if place.site.active}
        return adapted(value, list(by_site.values())) if by_site else value
