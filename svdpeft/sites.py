"""A site: one weight of one model that is adapted, and how its update reaches the output.

Two ways, by place where the weight is used. A layer that is *called* gets one module-level forward hook, which adds
the update into its fresh output. A weight that is *read* (a raw parameter, or a layer whose parent takes its
``weight``) is answered with W0 + ΔW, by a property on the layer's class. Parameter names, class names, kernels and
sharding of the base stay as they are in both.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svdpeft.decomposition import Product
from svdpeft.layers.base import CalledKind, LayerKind
from svdpeft.methods.base import Factored, Factors
from svdpeft.weights import BaseWeight

CHILD = "svdpeft"  # name of the child module that holds a layer's factors, by adapter and parameter
PLACES = "_svdpeft_places"  # plain attribute of an adapted layer: its places, in the order of attaching
HOOK = "_svdpeft_hook"  # plain attribute: the handle of its hook
CALLS = "_svdpeft_calls"  # plain attribute of a layer with a weight that is read: the handles of its hooks
NOW = "_svdpeft_now"  # plain attribute while such a layer runs: what has been computed in this call
BASE = "_svdpeft_base"  # attribute of a class with reading properties: the class that it stands for


@dataclass(eq=False)
class Place:
    """One use of a weight: most weights have one, a tied weight several.

    Args:
        module: the layer.
        parameter: name of the parameter there.
        kind: how this layer shows its weight.
        read: whether the weight is read there by others than the layer's own ``forward``.
    """

    module: nn.Module
    parameter: str
    kind: LayerKind
    read: bool
    called: bool = field(init=False)
    site: Site = field(init=False, repr=False)
    reached: bool = field(init=False, default=False)  # in an eager forward, by either way

    def __post_init__(self) -> None:
        self.called = self.kind.called(self.module)
        self.read |= not self.called


class Site:
    """One adapted weight, or one part of a fused one.

    Args:
        name: dotted name in the model ("blocks.0.attn.qkv", "blocks.0.att.w1", "layers.3.attn.qkv[q]").
        places: where it is used.
        part: name of the part of a fused weight, or "".
        method: the method with the rank of this site.
        factors: its tensors.
        weight: the base's weight, shared with other adapters on the same layer.
        shape: (batch, m, n) of the matrices.
    """

    def __init__(
        self,
        name: str,
        places: list[Place],
        part: str,
        method: Factored,
        factors: Factors,
        weight: BaseWeight,
        shape: tuple[int, int, int],
    ) -> None:
        self.name, self.places, self.part, self.method = name, places, part, method
        self.factors, self.weight, self.shape = factors, weight, shape
        self.key = ""  # of this site among all that are installed on a layer, once it is
        self.active = True  # the update is added
        self.folded = False  # the start has left the weight, so that all of L C A is added
        self.skips = False  # the factors hold the whole weight: the layer is computed from them alone
        with torch.no_grad():
            product = method.update(factors)
            mixes = product.C is not None and product.C.ndim == product.L.ndim
            self.dense = self.kind.prefers_dense(shape, product.rank, mixes)
        for place in places:
            place.site = self

    @property
    def kind(self) -> LayerKind:
        """The kind of the layer that the site is named after."""
        return self.places[0].kind

    @property
    def owners(self) -> list[nn.Module]:
        """The layers that use the weight."""
        return [place.module for place in self.places]

    @property
    def path(self) -> str:
        """How the update reaches the output, for the summary."""
        if self.skips:
            return "from factors alone"
        if any(place.read for place in self.places):
            return "parametrised"
        return "dense" if self.dense else "factored"

    @property
    def reached(self) -> bool:
        """Whether an eager forward has used the weight since it was last asked."""
        return any(place.reached for place in self.places)

    @property
    def count(self) -> int:
        """Number of trained values."""
        return sum(p.numel() for p in self.factors.parameters() if p.requires_grad)

    def product(self) -> Product:
        """What is added to the layer's own weight."""
        return self.method.now(self.factors) if self.folded else self.method.update(self.factors)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return ΔW in the weight's own layout, at least float32."""
        return self.kind.from_matrix(self.places[0].module, self.method.update(self.factors).dense())

    @torch.no_grad()
    def start(self) -> Tensor:
        """Return −[L C A]start in the weight's own layout, what folding writes into the weight."""
        anchor = self.method.anchor(self.factors)
        assert anchor is not None, "a start of zero is not written"
        return self.kind.from_matrix(self.places[0].module, -anchor.dense())

    def add(self, place: Place, x: Tensor, out: Tensor) -> Tensor:
        """Add the update to ``out``, the layer's fresh output for ``x``."""
        kind = place.kind
        assert isinstance(kind, CalledKind)
        if x.is_floating_point():  # token ids are neither dropped nor cast
            if self.method.dropout and place.module.training:
                x = F.dropout(x, self.method.dropout)
            x = x.to(out.dtype)
        add = kind.add_dense if self.dense else kind.add
        return add(place.module, x, out, self._cast(out.dtype))

    def replace(self, place: Place, x: Tensor) -> Tensor:
        """Return the layer's whole output, where the factors hold all of the weight."""
        kind, device = place.kind, x.device.type
        assert isinstance(kind, CalledKind)
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.tensor.dtype
        if x.is_floating_point():
            x = x.to(autocast)
        return kind.add_bias(place.module, kind.apply(place.module, x, self._cast(autocast)))

    def _cast(self, dtype: torch.dtype) -> Product:
        """The product in the dtype of the output: formed in the factors' own, so that only the result is rounded."""
        p = self.product()
        return p._replace(L=p.L.to(dtype), C=None if p.C is None else p.C.to(dtype), A=p.A.to(dtype))

    # -- coming and going -----------------------------------------------------------------------------------------

    def install(self, adapter: str) -> None:
        """Make the factors children of the layers, and have hook or property add the update."""
        for place in self.places:
            owner = place.module
            self.key = f"{adapter}:{place.parameter}" + (f"[{self.part}]" if self.part else "")
            others = [p for p in vars(owner).get(PLACES, []) if p.parameter == place.parameter]
            for other in others:
                other.site.use_base()
            place.read |= any(other.read for other in others)
            if PLACES not in vars(owner):
                setattr(owner, PLACES, [])
                owner.add_module(CHILD, nn.ModuleDict())
                setattr(owner, HOOK, owner.register_forward_hook(_add_updates, with_kwargs=True))
            getattr(owner, PLACES).append(place)
            getattr(owner, CHILD)[self.key] = self.factors
            _serve_reads(owner)

    def remove(self) -> None:
        """The inverse: afterwards the layers are what they were."""
        self.skip_base(False)
        for place in self.places:
            owner = place.module
            getattr(owner, PLACES).remove(place)
            del getattr(owner, CHILD)[self.key]
            _serve_reads(owner)
            if not getattr(owner, PLACES):
                getattr(owner, HOOK).remove()
                for name in (PLACES, CHILD, HOOK):
                    delattr(owner, name)

    def serve_reads(self, place: Place) -> None:
        """From now on answer whoever reads the weight at this place with W0 + ΔW."""
        self.use_base()
        place.read = True
        _serve_reads(place.module)

    def skip_base(self, skip: bool) -> None:
        """Compute the layers from the factors alone, and never from the weight, which is left as it is."""
        if skip == self.skips:
            return
        self.skips = skip
        for owner in self.owners:
            if skip:
                owner.forward = functools.partial(_without_base, owner)  # a bound method would not pickle
            else:
                del owner.forward

    def use_base(self) -> None:
        """Compute a folded layer from its weight again: somebody else has a hand in it now."""
        if self.skips:
            self.skip_base(False)
            self.weight.write(self.key, self.start)

    def can_skip_base(self) -> bool:
        """Whether the factors hold the whole weight and nobody else has a hand in the layer's forward."""
        return self.method.replaces_weight(*self.shape[1:]) and all(
            isinstance(p.kind, CalledKind)
            and p.kind.multiplies
            and not p.read
            and "forward" not in vars(p.module)
            and getattr(p.module, PLACES) == [p]
            for p in self.places
        )


def base_weight(owner: nn.Module, parameter: str) -> BaseWeight:
    """The one record of a parameter, however many adapters write into it; kept by its sites, so that copies have it."""
    places = (p for p in vars(owner).get(PLACES, []) if p.parameter == parameter)
    return next((p.site.weight for p in places), None) or BaseWeight(owner, parameter)


# -- a layer that is called ---------------------------------------------------------------------------------------


def _add_updates(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    for place in getattr(module, PLACES):
        if not place.called:
            continue
        if not torch.compiler.is_compiling():
            place.reached = True
        if place.site.active and not place.site.skips:
            out = place.site.add(place, _first(args, kwargs), out)
    return out


def _without_base(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    place = next(place for place in getattr(module, PLACES) if place.site.skips)
    return place.site.replace(place, _first(args, kwargs))


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


# -- a weight that is read ----------------------------------------------------------------------------------------


def adapted(weight: Tensor, places: list[Place]) -> Tensor:
    """Return W0 + ΔW of the given places in the weight's dtype; formed in at least float32 and rounded once."""
    with torch.autocast(weight.device.type, enabled=False):
        w = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for place in places:
            w = w + place.kind.from_matrix(place.module, place.site.product().dense())
        return w.to(weight.dtype)


def _read(module: Any, parameter: str) -> Tensor | None:
    """What ``module.<parameter>`` gives. Within the layer's own call its hook adds the update instead."""
    weight, now = module._parameters[parameter], getattr(module, NOW, None)
    eager = not torch.compiler.is_compiling()
    places = []
    for place in getattr(module, PLACES):
        if place.parameter == parameter and not (place.called and now is not None):
            if eager:
                place.reached = True
            if place.site.active:
                places.append(place)
    if weight is None or not places:
        return weight
    if now is None or not eager:  # a compiler finds the repeated computation itself
        return adapted(weight, places)
    # Experts read their weights once per expert: computed once per call. Under no_grad it has no graph.
    key = (parameter, torch.is_grad_enabled())
    if key not in now:
        now[key] = adapted(weight, places)
    return now[key]


def _serve_reads(module: Any) -> None:
    """Give the layer the class whose properties answer for the parameters that are read."""
    base = getattr(type(module), BASE, type(module))
    parameters = tuple(sorted({p.parameter for p in getattr(module, PLACES) if p.read}))
    module.__class__ = _reading_class(base, parameters) if parameters else base
    if parameters and CALLS not in vars(module):
        before = module.register_forward_pre_hook(_enter, prepend=True)
        setattr(module, CALLS, (before, module.register_forward_hook(_leave, prepend=True, always_call=True)))
    elif not parameters and CALLS in vars(module):
        for handle in getattr(module, CALLS):
            handle.remove()
        delattr(module, CALLS)


def _enter(module: Any, args: Any) -> None:
    setattr(module, NOW, {})


def _leave(module: Any, args: Any, out: Any) -> None:
    vars(module).pop(NOW, None)


@functools.cache
def _reading_class(base: Any, parameters: tuple[str, ...]) -> Any:
    """A subclass that is called like the base class, so that whoever looks for a layer by its class name finds it."""

    def getter(parameter: str) -> property:
        def read(module: Any) -> Tensor | None:
            try:
                return _read(module, parameter)
            except AttributeError as error:  # or Python would ask nn.Module.__getattr__, which knows W0 alone
                raise RuntimeError(f"the update of {parameter} cannot be formed: {error}") from error

        return property(read)

    def reduce(module: Any, protocol: Any) -> Any:
        # A class made here cannot be pickled by name: the base class and the parameters can.
        _, _, *state = base.__reduce_ex__(module, protocol)
        return (_new, (base, parameters), *state)

    body = {name: getter(name) for name in parameters}
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**body, **names, BASE: base, "__reduce_ex__": reduce})


def _new(base: Any, parameters: tuple[str, ...]) -> nn.Module:
    module = base.__new__(base)
    module.__class__ = _reading_class(base, parameters)
    return module
