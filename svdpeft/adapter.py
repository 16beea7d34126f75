"""The adapter: everything attached to one model under one name. Written once, for every method and layer kind.

The base weight is not touched unless the user merges or folds, and then every bit of it comes back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from svdpeft import steering
from svdpeft.factors import Factors, Progress
from svdpeft.methods.base import Method, PerSite
from svdpeft.per_example import routed
from svdpeft.reach import unwatch
from svdpeft.registry import near_miss
from svdpeft.sites import CHILD, Site
from svdpeft.summary import summarise
from svdpeft.weights import Borrowed, Frozen, MergeReport, running_statistics, stored

Condition = Literal["attached", "merged", "folded", "disabled", "in a per_example block", "detached"]
BatchNorm = Literal["train", "frozen"]
STATE = "_svdpeft"  # plain attribute of an adapted model


class State:
    """What the adapters of one model share."""

    def __init__(self, model: nn.Module) -> None:
        self.adapters: dict[str, Adapter] = {}
        base = ((name, p) for name, p in model.named_parameters() if f".{CHILD}." not in f".{name}")
        self.required_grad = {name: p.requires_grad for name, p in base}

    def sites(self) -> list[Site]:
        """The sites of all adapters."""
        return [site for adapter in self.adapters.values() for site in adapter.sites.values()]


def adapters_in(model: nn.Module, state: State) -> list[Adapter]:
    """Return the adapters of a model and those of its parts."""
    states = [vars(module)[STATE] for module in model.modules() if STATE in vars(module)]
    return [adapter for each in dict.fromkeys([*states, state]) for adapter in each.adapters.values()]


def set_requires_grad(model: nn.Module, state: State) -> None:
    """Freeze the base but for what an adapter of the model, or of a part of it, trains whole."""
    adapters = adapters_in(model, state)
    trained = {id(stored(*place)) for adapter in adapters for place in adapter.whole.values()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in state.required_grad:
        if name in parameters:
            parameters[name].requires_grad_(id(parameters[name]) in trained)


class Adapter:
    """Everything that was attached to one model under one name; made by ``attach`` and ``load``."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        pairs: list[tuple[str, Method]],
        sites: dict[str, Site],
        whole: dict[str, tuple[nn.Module, str]],
        skipped: dict[str, str],
        batch_norm: BatchNorm,
    ) -> None:
        self.model, self.name = model, name
        self.patterns = [pattern for pattern, _ in pairs]
        self.methods = [method for _, method in pairs]
        self.sites: Mapping[str, Site] = sites
        self.whole = whole
        self.skipped: Mapping[str, str] = skipped
        self.state: Condition = "attached"
        taken = {n for a in getattr(model, STATE).adapters.values() for n in a.borrowed.places}
        statistics = {n: place for n, place in running_statistics(model).items() if n not in taken}
        self.borrowed = Borrowed({**whole, **statistics})
        self.batch_norm: BatchNorm = batch_norm
        self.frozen = Frozen(model) if batch_norm == "frozen" else None
        self.steps = 0  # optimizer steps so far, of this training
        self._stepped = False
        self._total: int | None = None  # steps of the whole training, where somebody has said

    # -- what there is --------------------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What trains: ``("blocks.0.attn.qkv/L", …)`` for factors, the base's own name for whole parameters.

        A parameter that several sites share goes by the name of the first.
        """
        seen: set[int] = set()
        for name, site in self.sites.items():
            for role, parameter in site.factors.named_parameters():
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{name}/{role}", parameter
        for name, (owner, attribute) in self.whole.items():
            yield name, cast(nn.Parameter, stored(owner, attribute))

    def parameters(self) -> Iterator[nn.Parameter]:
        """What trains."""
        return (parameter for _, parameter in self.named_parameters())

    def roles(self) -> dict[str, list[nn.Parameter]]:
        """What trains by role: ``"L"``, ``"C"``, ``"A"``, what else a method trains, and ``"whole"``."""
        roles: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            roles.setdefault(name.rpartition("/")[2] if "/" in name else "whole", []).append(parameter)
        return roles

    @property
    def trainable_count(self) -> int:
        """Number of trained values, factors and whole parameters together."""
        return sum(p.numel() for p in self.parameters())

    def site(self, name: str) -> Site:
        """Return one site by name."""
        if name not in self.sites:
            raise ValueError(f"no site is called {name!r}: {near_miss(name, self.sites)}")
        return self.sites[name]

    def delta(self, name: str) -> Tensor:
        """Return ΔW of one site, dense, in the weight's own layout and at least float32."""
        return self.site(name).delta()

    @property
    def unreached(self) -> list[str]:
        """The sites that no eager forward of the model has touched so far; what trains there gets no gradient."""
        return [name for name, site in self.sites.items() if not site.reached]

    def check_reach(self, *args: Any, **kwargs: Any) -> list[str]:
        """Run the model once on a sample batch, in evaluation mode, and see which sites it touches.

        The first batch of a training loop does the same by itself, and warns.

        Args:
            args: what the model is called with.
            kwargs: what the model is called with.

        Returns:
            The sites that it did not touch.
        """
        self._must_be("attached", "merged", "folded")
        training = [module for module in self.model.modules() if module.training]
        for place in (place for site in self.sites.values() for place in site.places):
            place.calls = place.reads = False
        unwatch(self.model)
        try:
            for module in training:  # and not eval(): what holds a layer's mode would take it for the user's wish
                module.training = False
            with torch.no_grad():
                self.model(*args, **kwargs)
        finally:
            for module in training:
                module.training = True
        return self.unreached

    def summary(self) -> str:
        """Return a table of every site, its shape, kind and trainable count, and of what was left and why."""
        return summarise(self)

    def __repr__(self) -> str:
        methods = ", ".join(dict.fromkeys(map(str, self.methods)))
        return (
            f"Adapter({self.name!r}, {methods}, {len(self.sites)} sites, "
            f"{self.trainable_count:,} trainable, {self.state})"
        )

    def set(self, **values: float) -> None:
        """Turn what the methods let be turned while the model runs, at every site whose method has it.

        Args:
            values: by name, such as ``coefficient=-1.0`` of AntiPaSTO or ``strength=0.5`` of SVDiff.

        Raises:
            ValueError: a name that no method has, or a value that is not a finite number. Nothing is set then.
        """
        if self.state not in ("attached", "folded"):
            how = {"merged": "unmerge() it first, and merge() again afterwards", "detached": "attach or load it again"}
            raise RuntimeError(f"adapter {self.name!r} is {self.state}: {how.get(self.state, 'leave the block first')}")
        steering.write(self.sites.values(), values)

    # -- switching ------------------------------------------------------------------------------------------------

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model computes as if this adapter were not there, bit for bit."""
        if self.state == "disabled":  # a block within a block
            yield
            return
        with self.unwritten():
            self.borrowed.swap()
            self._activate(False)
            if self.frozen:
                self.frozen.release()
            self.state = "disabled"
            try:
                yield
            finally:
                self.state = "attached"
                self.borrowed.swap()
                self._activate(True)
                if self.frozen:
                    self.frozen.hold()

    @contextmanager
    def unwritten(self) -> Iterator[None]:
        """Within the block nothing of this adapter is written in the base weights; afterwards again what was."""
        self._must_be("attached", "merged", "folded")
        state = self.state
        self._to("attached")
        try:
            yield
        finally:
            self._to(state)

    @contextmanager
    def per_example(self, names: Sequence[str | None], flattened: bool = False) -> Iterator[None]:
        """Within the block every row of a batch is computed with an adapter of its own: ``model(x)`` as ever.

        The base is computed once for all rows. Each adapter that is named adds one low-rank pass over its own rows, and
        a copy of their inputs and outputs, at each of its layers; adapters that are not named cost nothing, and add
        nothing. Every adapter gets the gradient of its own rows. A batch whose rows are all of one adapter gives that
        adapter's outputs. Where activations are checkpointed, ``backward`` belongs in the block too.

        Rows are indices of the first axis of what a layer is called with. If a model puts time first, a batch of as
        many examples as time steps cannot be told from one that is right. In training mode batch normalisation
        mixes rows, as always.

        Args:
            names: of an adapter of the same model for every row of the batch; ``None`` or ``"base"`` for none. Any
                adapter of the model may be asked, and any may be named.
            flattened: layers may see several rows for each example (windows, tokens), all of the first example, then
                all of the second, and so on. Without it such a layer is refused.

        Raises:
            ValueError: a name that no adapter has; parameters or statistics that an adapter has changed whole, since
                they are one for the whole batch; in the forward, a layer that does not see one row per example.
            RuntimeError: an adapter that is merged or folded, one that is named and disabled, a weight that is read
                instead of called, a block within a block.

        Example:
            >>> from svdpeft import LoRA, attach
            >>> model = nn.Linear(4, 3)
            >>> a, b = attach(model, LoRA(rank=1), name="a"), attach(model, LoRA(rank=2), name="b")
            >>> with a.per_example(["a", "b", None, "a"]):
            ...     model(torch.zeros(4, 4)).shape
            torch.Size([4, 3])
        """
        self._must_be("attached", "merged", "folded", "disabled")
        state: State = getattr(self.model, STATE)
        with routed(self.model, adapters_in(self.model, state), state.adapters, names, flattened):
            yield

    def merge(self, permanent: bool = False) -> MergeReport:
        """Write W0 + ΔW into the base weights, so that the adapted model costs what the base does.

        A copy of each weight is kept for ``unmerge``.

        Args:
            permanent: keep no copy, and take the factors out of the model: what remains is a plain model with
                merged weights, and this adapter is spent.

        Returns:
            The share of each site's update that was lost in rounding to the weight's dtype.
        """
        self._must_be("attached", "folded")
        if permanent:
            self._check_no_transform_beside()
        self._to("attached")
        report = self._to("merged")
        if permanent:
            self._leave(restore=False)
        return report

    def _check_no_transform_beside(self) -> None:
        """The change of a method outside the equation depends on W0: a new base would silently change it."""
        weights = {id(site.weight) for site in self.sites.values()}
        for site in getattr(self.model, STATE).sites():
            mine = site is self.sites.get(site.name)
            if not mine and id(site.weight) in weights and site.method.product(site.factors) is None:
                raise ValueError(
                    f"another adapter transforms the weight of {site.name} ({site.method}): with another base "
                    "it would no longer be what was trained; merge or detach that one first"
                )

    def unmerge(self) -> None:
        """Give the base weights back, bit for bit, and add the update in the forward pass again."""
        self._must_be("merged")
        self._to("attached")

    def fold(self) -> None:
        """Write W0 − [L C A]start into the base weights: the papers' layout, one low-rank path less per layer.

        Outputs agree with the unfolded model up to rounding. A full-rank SVFT layer is then computed from its factors
        alone. Training goes on as before.
        """
        self._must_be("attached")
        for site in self.sites.values():
            if site.method.dropout:
                raise ValueError(
                    f"dropout {site.method.dropout} at {site.name}: folded, it would also drop the part of W0 that the "
                    "factors took over; fold() needs dropout=0"
                )
            if len(site.places) > 1:
                raise ValueError(f"{site.name} shares its weight with other layers: folding is refused there")
        self._to("folded")

    def unfold(self) -> None:
        """Give the base weights back, bit for bit."""
        self._must_be("folded")
        self._to("attached")

    def detach(self) -> None:
        """Take everything out of the model again: parameters, buffers, hooks and flags are what they were."""
        self._must_be("attached", "merged", "folded")
        self._to("attached")
        self._leave(restore=True)

    @torch.no_grad()
    def _to(self, state: Condition) -> MergeReport:
        """Go to a state; from "merged" and "folded" the only way is back to "attached"."""
        lost: dict[str, float] = {}
        if state == self.state:
            return MergeReport(lost)
        try:
            for site in self.sites.values():
                lost[site.name] = site.go(state)
        except BaseException:  # out of memory, or Ctrl-C: half of the sites must not stay merged
            for site in self.sites.values():
                site.go("attached")
            self.state = "attached"
            raise
        self.state = state
        return MergeReport(lost)

    def _activate(self, active: bool) -> None:
        for site in self.sites.values():
            site.active = active

    @torch.no_grad()
    def _leave(self, restore: bool) -> None:
        state: State = getattr(self.model, STATE)
        for site in self.sites.values():
            if not restore:
                site.weight.keep(site.key)
            site.remove()
        if restore:
            self.borrowed.swap()
        if self.frozen:
            self.frozen.release()
        del state.adapters[self.name]
        self.state = "detached"
        if state.adapters:
            heir = next(iter(state.adapters.values()))
            heir.borrowed.add({n: place for n, place in self.borrowed.places.items() if n not in self.whole})
            set_requires_grad(self.model, state)
            return
        unwatch(self.model)
        delattr(self.model, STATE)
        parameters = dict(self.model.named_parameters())
        for name, required in state.required_grad.items():
            if name in parameters:  # the user may have replaced a head since
                parameters[name].requires_grad_(required)

    def _must_be(self, *states: str) -> None:
        if self.state not in states:
            raise RuntimeError(f"adapter {self.name!r} is {self.state}; this needs it to be {' or '.join(states)}")

    # -- training -------------------------------------------------------------------------------------------------

    def _by_method(self) -> list[tuple[PerSite, list[Factors]]]:
        groups: dict[str, tuple[PerSite, list[Factors]]] = {}
        for site in self.sites.values():  # one method, whatever the ranks of its sites
            groups.setdefault(repr(site.method.general()), (site.method, []))[1].append(site.factors)
        return list(groups.values())

    def penalty(self) -> Tensor | None:
        """Return what the methods add to the loss, a differentiable scalar, or ``None`` where there is nothing."""
        terms = [term for method, factors in self._by_method() if (term := method.penalty(factors)) is not None]
        return torch.stack(terms).sum() if terms else None

    def before_step(self, peak_lr: float, total_steps: int | None = None) -> None:
        """Let the methods change the gradients: after clipping, before the optimizer's step.

        Args:
            peak_lr: the largest learning rate of the schedule.
            total_steps: optimizer steps of the whole training, for methods with a schedule of their own.
        """
        self._total = total_steps
        progress = Progress(self.steps + 1, total_steps, peak_lr=peak_lr)
        for method, factors in self._by_method():
            method.before_step(factors, progress)
        self._stepped = True

    def after_step(self, lr_scale: float = 1.0, total_steps: int | None = None) -> None:
        """Let the methods change the factors after the optimizer's step, before the gradients are cleared.

        Args:
            lr_scale: lr_t / lr_peak, where the schedule is now.
            total_steps: as in ``before_step``; default what it was told there.

        Raises:
            RuntimeError: a method needs ``before_step`` and it was not called.
        """
        progress = Progress(self.steps + 1, total_steps or self._total, lr_scale=lr_scale)
        for method, factors in self._by_method():
            if method.changes_gradients and not self._stepped:
                raise RuntimeError(f"{method} acts on the gradients: call adapter.before_step(peak_lr) before the step")
            method.after_step(factors, progress)
            for f in factors:
                f.settle()
        self.steps += 1
        self._stepped = False

    # -- files ----------------------------------------------------------------------------------------------------

    def save(self, path: Any) -> None:
        """Write the adapter into the folder ``path``: see ``svdpeft.checkpoint``."""
        from svdpeft.checkpoint import save  # the file format knows the adapter, not the other way round

        save(self, path)
