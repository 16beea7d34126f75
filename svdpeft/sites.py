"""A site: one weight of one model that is adapted, and how its update reaches the output.

The update is added by one module-level forward hook per layer, into the layer's fresh output. Names, types, kernels
and sharding of the base stay as they are.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svdpeft.decomposition import Product
from svdpeft.layers.base import LayerKind
from svdpeft.methods.base import Factored, Factors
from svdpeft.weights import BaseWeight

CHILD = "svdpeft"  # name of the child module that holds a layer's factors, by adapter name
LISTED = "_svdpeft_sites"  # plain attribute of an adapted layer: its sites, in the order of attaching
HOOK = "_svdpeft_hook"  # plain attribute: the handle of its hook


class Site:
    """One adapted weight.

    Args:
        name: dotted name of the layer in the model ("blocks.0.attn.qkv").
        owners: the layers that use the weight, usually one; several where they share it.
        kind: how the layer shows its weight.
        method: the method with the rank of this site.
        factors: its tensors.
        weight: the base's weight, shared with other adapters on the same layer.
        shape: (batch, m, n) of the matrices.
    """

    def __init__(
        self,
        name: str,
        owners: list[nn.Module],
        kind: LayerKind,
        method: Factored,
        factors: Factors,
        weight: BaseWeight,
        shape: tuple[int, int, int],
    ) -> None:
        self.name, self.owners, self.kind, self.method = name, owners, kind, method
        self.factors, self.weight, self.shape = factors, weight, shape
        self.adapter = ""  # name of the adapter, once installed
        self.active = True  # the hook adds the update
        self.folded = False  # the start has left the weight, so that the hook adds all of L C A
        self.skips = False  # the factors hold the whole weight: the layer is computed from them alone
        with torch.no_grad():
            product = method.update(factors)
            mixes = product.C is not None and product.C.ndim == product.L.ndim
            self.dense = kind.prefers_dense(shape, product.rank, mixes)

    @property
    def count(self) -> int:
        """Number of trained values."""
        return sum(p.numel() for p in self.factors.parameters() if p.requires_grad)

    def product(self) -> Product:
        """What the hook adds to the layer's own weight."""
        return self.method.now(self.factors) if self.folded else self.method.update(self.factors)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return ΔW in the weight's own layout, at least float32."""
        return self.kind.from_matrix(self.owners[0], self.method.update(self.factors).dense())

    @torch.no_grad()
    def start(self) -> Tensor:
        """Return −[L C A]start in the weight's own layout, what folding writes into the weight."""
        anchor = self.method.anchor(self.factors)
        assert anchor is not None, "a start of zero is not written"
        return self.kind.from_matrix(self.owners[0], -anchor.dense())

    def add(self, module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """Add the update to ``out``, the layer's fresh output for ``x``."""
        if self.method.dropout and module.training:
            x = F.dropout(x, self.method.dropout)
        add = self.kind.add_dense if self.dense else self.kind.add
        return add(module, x.to(out.dtype), out, self._cast(out.dtype))

    def replace(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return the layer's whole output, where the factors hold all of the weight."""
        device = x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.tensor.dtype
        return self.kind.add_bias(module, self.kind.apply(module, x.to(autocast), self._cast(autocast)))

    def _cast(self, dtype: torch.dtype) -> Product:
        """The product in the dtype of the output: formed in the factors' own, so that only the result is rounded."""
        p = self.product()
        return p._replace(L=p.L.to(dtype), C=None if p.C is None else p.C.to(dtype), A=p.A.to(dtype))

    # -- coming and going -----------------------------------------------------------------------------------------

    def install(self, adapter: str) -> None:
        """Make the factors children of the layers and have the hook call this site."""
        self.adapter = adapter
        for owner in self.owners:
            for other in vars(owner).get(LISTED, []):
                other.use_base()
            if LISTED not in vars(owner):
                setattr(owner, LISTED, [])
                owner.add_module(CHILD, nn.ModuleDict())
                setattr(owner, HOOK, owner.register_forward_hook(_add_updates, with_kwargs=True))
            getattr(owner, LISTED).append(self)
            getattr(owner, CHILD)[adapter] = self.factors

    def remove(self, adapter: str) -> None:
        """The inverse: afterwards the layers are what they were."""
        self.skip_base(False)
        for owner in self.owners:
            getattr(owner, LISTED).remove(self)
            del getattr(owner, CHILD)[adapter]
            if not getattr(owner, LISTED):
                getattr(owner, HOOK).remove()
                for name in (LISTED, CHILD, HOOK):
                    delattr(owner, name)

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
        """Compute a folded layer from its weight again: another adapter, which may write into it, has come."""
        if self.skips:
            self.skip_base(False)
            self.weight.write(self.adapter, self.start)

    def can_skip_base(self) -> bool:
        """Whether the factors hold the whole weight and nobody else has a hand in the layer's forward."""
        whole = self.method.replaces_weight(*self.shape[1:])
        alone = all("forward" not in vars(o) and getattr(o, LISTED) == [self] for o in self.owners)
        return whole and alone


def base_weight(owner: nn.Module, parameter: str) -> BaseWeight:
    """The one record of a parameter, however many adapters write into it; kept by its sites, so that copies have it."""
    listed = (site.weight for site in vars(owner).get(LISTED, []))
    return next((w for w in listed if w.parameter == parameter), None) or BaseWeight(owner, parameter)


def _add_updates(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
    x = args[0] if args else next(iter(kwargs.values()))
    for site in getattr(module, LISTED):
        if site.active and not site.skips:
            out = site.add(module, x, out)
    return out


def _without_base(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    x = args[0] if args else next(iter(kwargs.values()))
    site = next(site for site in getattr(module, LISTED) if site.skips)
    return site.replace(module, x)
