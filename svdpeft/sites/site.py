"""A site: one weight of one model that is adapted, and how its update reaches the output.

Two ways, and both are there from the start. A layer that is *called* gets one module-level forward hook, which adds the
update into its fresh output. Whoever *reads* the weight otherwise (a raw parameter, a parent that takes a layer's
``weight``) is answered with W0 + ΔW, by a property on the layer's class, which within the layer's own call answers W0.
Parameter names, class names, kernels and sharding of the base stay as they are.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from svdpeft.decomposition import Product, full_precision
from svdpeft.layers.base import CalledKind, LayerKind
from svdpeft.methods.base import Factors, PerSite, Transform
from svdpeft.sites.call import LayerCall
from svdpeft.sites.hook import HOOK, add_updates, without_base
from svdpeft.sites.place import CHILD, PLACES, Place
from svdpeft.sites.reads import dress
from svdpeft.sites.rows import Rows
from svdpeft.sites.scope import scope
from svdpeft.sites.weights import BaseWeight


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
        method: PerSite,
        factors: Factors,
        weight: BaseWeight,
        shape: tuple[int, int, int],
    ) -> None:
        self.name, self.places, self.part, self.method = name, places, part, method
        self.factors, self.weight, self.shape = factors, weight, shape
        self.active = True  # the update is added, where a block of the caller's says nothing else
        self.folded = False  # the start has left the weight, so that all of L C A is added
        self.skips = False  # the factors hold the whole weight: the layer is computed from them alone
        with torch.no_grad():
            product = method.product(factors)
        if product is not None:
            self.dense = self.prefers_dense(product)  # ΔW is built
        else:
            called = [place.kind.linear for place in places if place.can_call]
            self.dense = not (called and isinstance(method, Transform) and all(map(method.acts, called)))
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
        if self.read_only:
            return "parametrised"
        return "dense" if self.dense else "factored"

    @property
    def reached(self) -> bool:
        """Whether an eager forward has used the weight since it was last asked."""
        return any(place.was_called or place.was_read for place in self.places)

    @property
    def read_only(self) -> bool:
        """Whether no layer that has the weight is called, as far as is known."""
        return all(not place.can_call or (place.was_read and not place.was_called) for place in self.places)

    @property
    def count(self) -> int:
        """Number of trained values of this site alone: what it shares with others is counted by the adapter."""
        own = ((name, p) for name, p in self.factors.named_parameters() if name not in self.factors.tied)
        return sum(p.numel() for _, p in own if p.requires_grad)

    def base_matrix(self) -> Float[Tensor, "*b {self.shape[1]} {self.shape[2]}"]:
        """W0 as matrices, at least float32, whatever is written into the weight at present."""
        w = self.kind.to_matrix(self.places[0].module, self.weight.original)
        return w.to(torch.promote_types(w.dtype, torch.float32))  # of a part no more than that

    def matrix(self, folded: bool = False) -> Float[Tensor, "*b {self.shape[1]} {self.shape[2]}"]:
        """What is added to the layer's own weight as matrices, dense: ΔW, or all of L C A where the site is folded."""
        product = self.method.product(self.factors, folded)
        return self.method.delta(self.factors, self.base_matrix()) if product is None else product.dense()

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return ΔW in the weight's own layout, at least float32."""
        return self.kind.from_matrix(self.places[0].module, self.matrix())

    @torch.no_grad()
    def rowwise(self) -> Product | None:
        """ΔW as a product with a row for each of the weight's, or ``None`` where the weight's layout is another one."""
        product, matrix = self.method.product(self.factors), torch.empty(self.shape[1:], device="meta")
        same = self.shape[0] == 1 and self.kind.from_matrix(self.places[0].module, matrix) is matrix
        return product if same else None

    @torch.no_grad()
    def minus_start(self) -> Tensor:
        """Return −[L C A]start in the weight's own layout, what folding writes into the weight."""
        anchor = self.method.anchor(self.factors)
        assert anchor is not None, "a start of zero is not written"
        return self.kind.from_matrix(self.places[0].module, -anchor.dense())

    @property
    def acts(self) -> bool:
        """Whether the update is added here, within the blocks of the caller, to all rows or to some."""
        return bool((scope() or {}).get(self, self.active))

    def add(self, place: Place, x: Tensor, out: Tensor, own: Tensor | None = None, rows: Rows | None = None) -> Tensor:
        """Add the update to ``out``, the layer's fresh output for ``x``.

        Args:
            place: the layer.
            x: its input.
            out: its output with the updates of those before; changed in place unless ``keeps_output``.
            own: its output as the layer has made it, where nothing has been added to that in place.
            rows: of this adapter, where all others are left as they are.
        """
        mine = None if rows is None else rows.of(self.name, x, out)
        if mine is not None:
            own = None if own is None else own.index_select(0, mine)
            part = self.add(place, x.index_select(0, mine), out.index_select(0, mine), own)
            return out.index_copy_(0, mine, part.to(out.dtype))
        kind = place.kind
        assert isinstance(kind, CalledKind)
        self.check_stepped(place)
        if isinstance(out, Tensor):  # and no proxy of torch.fx
            self.check_device(out.device)
        product = self._product(x.device.type, self.folded)
        if x.is_floating_point():  # token ids are neither dropped nor cast
            if self.method.dropout and place.module.training and product is not None:
                x = F.dropout(x, self.method.dropout)
            x = x.to(out.dtype)
        if product is None:
            return self._add_change(place, x, out, own)
        product = kind.suited(product).to(out.dtype)
        if out.is_nested:  # a padded batch of torch's own encoder, on which nothing works in place
            return out + kind.apply(place.module, x, product)
        if self.dense:
            return kind.add_matrix(place.module, x, out, product.dense())
        return kind.add(place.module, x, out, product)

    def _product(self, device: str, folded: bool) -> Product | None:
        """The product, formed in the factors' own precision whatever the autocast: only the result is rounded."""
        if not torch.is_autocast_enabled(device):
            return self.method.product(self.factors, folded)
        with torch.autocast(device, enabled=False):
            return self.method.product(self.factors, folded)

    def _add_change(self, place: Place, x: Tensor, out: Tensor, own: Tensor | None) -> Tensor:
        """ΔW x of a method outside the equation: its tensors in their own precision, the layer in its output's."""
        kind, method, factors = place.kind, self.method, self.factors
        assert isinstance(kind, CalledKind)
        assert isinstance(method, Transform)
        with full_precision(self.weight.tensor):
            if method.dropout and place.module.training:
                factors = method.thinned(factors)
            if not self.dense and not out.is_nested:
                call = LayerCall(place, x, out, None if self.weight.overwritten else own)
                return out + method.act(factors, call)
            matrix = method.delta(factors, self.base_matrix()).to(out.dtype)
            if out.is_nested:
                return out + kind.run_like(place.module, x, kind.from_matrix(place.module, matrix), out)
            return kind.add_matrix(place.module, x, out, matrix)

    @property
    def keeps_output(self) -> bool:
        """Whether ``add`` makes a new tensor."""
        return not self.dense and isinstance(self.method, Transform)

    def prefers_dense(self, product: Product) -> bool:
        """Whether building the product costs less than going through its factors."""
        mixes = isinstance(product.C, Tensor) and product.C.ndim == product.L.ndim
        own = {id(p) for p in self.factors.parameters() if not p.requires_grad}
        return self.kind.prefers_dense(self.shape, product.rank, mixes, {id(product.L), id(product.A)} <= own)

    def check_stepped(self, place: Place) -> None:
        """Refuse to train on where a method's own step was left out: it would be another method without a word."""
        if torch.compiler.is_compiling() or not self.method.has_step:
            return
        if place.module.training and torch.is_grad_enabled() and self.factors.was_stepped():
            raise RuntimeError(
                f"{self.name} has changed since its last forward in training, and {type(self.method).__name__} has not "
                "done its own step: call adapter.before_step(peak_lr, total_steps) before optimizer.step() and "
                "adapter.after_step(lr_scale) after it, or train with svdpeft.Trainer or AdapterCallback"
            )

    def check_size(self) -> None:
        """Refuse a weight that somebody has resized since it was adapted."""
        try:
            self.weight.check_size()
        except RuntimeError as error:
            raise RuntimeError(f"{self.name}: {error}") from error

    def check_device(self, device: torch.device) -> None:
        """Refuse factors that have been moved away: torch adds a meta tensor to a real one without a word."""
        found = next(iter(self.factors._parameters.values())).device  # type: ignore[union-attr]  # asked in every call
        if found != device:
            raise RuntimeError(
                f"the factors of {self.name} are on {found} and the layer computes on {device}: keep "
                "them with their layer; an adapted layer cannot be offloaded (accelerate's cpu_offload, disk_offload)"
            )

    def replace(self, place: Place, x: Tensor) -> Tensor:
        """Return the layer's whole output, where the factors hold all of the weight."""
        kind, device = place.kind, x.device.type
        assert isinstance(kind, CalledKind)
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.tensor.dtype
        if x.is_floating_point():
            x = x.to(autocast)
        product = self._product(device, folded=True)
        assert product is not None, "only factors can hold the whole weight"
        product = kind.suited(product)
        return kind.add_bias(place.module, kind.apply(place.module, x, product.to(autocast)))

    # -- coming and going -----------------------------------------------------------------------------------------

    def install(self, adapter: str) -> None:
        """Make the factors children of the layers, and have hook or property add the update."""
        for place in self.places:
            owner = place.module
            place.key = place.key_for(adapter, self.part)
            for other in vars(owner).get(PLACES, []):
                other.site.use_base()
            if PLACES not in vars(owner):
                setattr(owner, PLACES, [])
                owner.add_module(CHILD, nn.ModuleDict())
                # Before the hooks of others, which are to see the adapted output.
                handle = owner.register_forward_hook(add_updates, with_kwargs=True, prepend=True)
                setattr(owner, HOOK, handle)
            getattr(owner, PLACES).append(place)
            getattr(owner, CHILD)[place.key] = self.factors
            dress(owner)

    def remove(self) -> None:
        """The inverse: afterwards the layers are what they were. Can be repeated after an interruption."""
        self.skip_base(False)
        for place in self.places:
            owner = place.module
            if PLACES not in vars(owner):
                continue
            if place in getattr(owner, PLACES):
                getattr(owner, PLACES).remove(place)
            if place.key in getattr(owner, CHILD):
                del getattr(owner, CHILD)[place.key]
            dress(owner)
            if not getattr(owner, PLACES):
                getattr(owner, HOOK).remove()
                for name in (HOOK, CHILD, PLACES):
                    delattr(owner, name)

    def go(self, state: str) -> float:
        """Go from "attached" to "merged" or "folded", or back from either.

        Returns:
            The share of the update that was lost in rounding, if it was merged.
        """
        lost = 0.0
        if state != "attached":
            self.check_size()
            self.weight.check_whole()
        if state == "attached":
            self.skip_base(False)
            if self.weight.written(self):
                self.weight.erase(self)
        elif state == "merged":
            lost = self.weight.write(self, self.delta)
        elif self.can_skip_base():
            self.skip_base(True)
        elif self.method.anchor(self.factors) is not None:
            self.weight.write(self, self.minus_start)
        self.folded, self.active = state == "folded", state != "merged"
        return lost

    def skip_base(self, skip: bool) -> None:
        """Compute the layers from the factors alone, and never from the weight, which is left as it is."""
        if skip == self.skips:
            return
        self.skips = skip
        for owner in self.owners:
            if skip:
                owner.forward = functools.partial(without_base, owner)  # a bound method would not pickle
            else:
                del owner.forward

    def use_base(self) -> None:
        """Compute a folded layer from its weight again: somebody else has a hand in it now."""
        if self.skips:
            self.skip_base(False)
            self.weight.write(self, self.minus_start)

    def can_skip_base(self) -> bool:
        """Whether the factors hold the whole weight and nobody else has a hand in the layer's forward."""
        return self.method.replaces_weight(*self.shape[1:]) and all(
            isinstance(p.kind, CalledKind)
            and p.kind.multiplies
            and "forward" not in vars(p.module)
            and getattr(p.module, PLACES) == [p]
            for p in self.places
        )
