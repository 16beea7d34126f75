"""The adapter: everything attached to one model under one name. Written once, for every method and layer kind.

The base weight is not touched unless the user merges or folds, and then every bit of it comes back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from svdpeft.adapter import blocks, steering
from svdpeft.adapter.dequantising import dequantise, quantise_again, stay_plain
from svdpeft.adapter.deriving import Bases, cost
from svdpeft.adapter.file import Source, State
from svdpeft.adapter.gradients import Rule, rule_for
from svdpeft.adapter.pretrained import SavePretrained, plain
from svdpeft.adapter.reach import run_once, unwatch
from svdpeft.adapter.roster import ROSTER, Roster, enlist, held_elsewhere
from svdpeft.adapter.routing import by_example, must_be
from svdpeft.adapter.saving import Contents, save, to_state
from svdpeft.adapter.steps import Steps
from svdpeft.adapter.summary import lowered, summarise
from svdpeft.adapter.swapping import swap_in
from svdpeft.adapter.switching import WAYS, check_foldable, check_no_transform_beside, check_there, go, guard_loading
from svdpeft.adapter.turns import changes, turns
from svdpeft.adapter.untying import Untied, check_not_shared, tie_again, untie
from svdpeft.methods.base import Method
from svdpeft.registry import near_miss
from svdpeft.sites.normalisation import Frozen, running_statistics
from svdpeft.sites.scope import leave, scope
from svdpeft.sites.shards import count
from svdpeft.sites.site import Site
from svdpeft.sites.versions import Own
from svdpeft.sites.weights import MergeReport, stored

Condition = Literal["attached", "merged", "folded", "disabled", "in a per_example block", "detached"]
BatchNorm = Literal["train", "frozen"]


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
        self._state: Condition = "attached"
        elsewhere = held_elsewhere(getattr(model, ROSTER))  # by an adapter of a part of the model, or of a larger one
        statistics = {n: p for n, p in running_statistics(model).items() if id(stored(*p)) not in elsewhere}
        self.own = Own(getattr(model, ROSTER).versions, name, whole, statistics)
        self.batch_norm: BatchNorm = batch_norm
        self.frozen = Frozen(model) if batch_norm == "frozen" else None
        self._unties, self.untied = False, list[Untied]()
        self._dtype: torch.dtype | None = None  # of the weights that merging puts in the place of quantised ones
        self._steps = Steps(sites.values())
        self._guard = guard_loading(model, self)
        enlist(self)

    @property
    def state(self) -> Condition:
        """What it is in, or in the blocks of the caller."""
        return (scope() or {}).get(self, self._state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        enlist(self)  # a copy, or one that was pickled

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
        for name in self.whole:
            yield name, cast(nn.Parameter, self.own[name])

    def parameters(self) -> Iterator[nn.Parameter]:
        """What trains."""
        return (parameter for _, parameter in self.named_parameters())

    def roles(self) -> dict[str, list[nn.Parameter]]:
        """What trains by role: ``"L"``, ``"C"``, ``"A"``, what else a method trains, and ``"whole"``."""
        roles: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            role = "whole" if name in self.whole else name.rpartition("/")[2]  # modules may have a slash in their names
            roles.setdefault(role, []).append(parameter)
        return roles

    @property
    def trainable_count(self) -> int:
        """Number of trained values, factors and whole parameters together."""
        return sum(count(p) for p in self.parameters())

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
        run_once(self.model, self.sites.values(), args, kwargs)
        return self.unreached

    def summary(self) -> str:
        """Return a table of every site, its shape, kind and trainable count, of what was left and why, and what a
        load costs where the file holds no bases.
        """
        short = lowered(self.methods, self.sites)
        return summarise(repr(self), self.model, self.sites, self.whole, self.skipped, short, cost(self.sites))

    def __repr__(self) -> str:
        methods = ", ".join(dict.fromkeys(map(str, self.methods)))
        return (
            f"Adapter({self.name!r}, {methods}, {len(self.sites)} sites, "
            f"{self.trainable_count:,} trainable, {self.state})"
        )

    @changes
    def set(self, **values: float) -> None:
        """Turn what the methods let be turned while the model runs, at every site whose method has it.

        Args:
            values: by name, such as ``coefficient=-1.0`` of AntiPaSTO or ``strength=0.5`` of SVDiff.

        Raises:
            ValueError: a name that no method has, or a value that is not a finite number. Nothing is set then.
        """
        if self.state in WAYS:
            again = ", and merge() again afterwards" if self.state == "merged" else ""
            raise RuntimeError(f"adapter {self.name!r} is {self.state}: {WAYS[self.state]}{again}")
        steering.write(self.sites.values(), values)

    # -- switching ------------------------------------------------------------------------------------------------

    @changes
    def disable(self) -> None:
        """Let the model compute as if this adapter were not there, bit for bit, until ``enable``.

        It can be saved, and merged, which turns it on. One that is merged or folded is taken out of the weights first.
        """
        self._must_be("attached", "merged", "folded")
        leave(self, *self.sites.values())
        self._to("attached")
        blocks.activate(self, False)
        self.own.turn(on=False)
        if self.frozen:
            self.frozen.release()
        self._state = "disabled"

    @changes
    def enable(self) -> None:
        """Let a disabled adapter act again; one that is on stays as it is."""
        self._must_be("attached", "merged", "folded", "disabled")
        leave(self, *self.sites.values())
        if self._state != "disabled":
            return
        self._state = "attached"
        self.own.turn(on=True)
        blocks.activate(self, True)
        if self.frozen:
            self.frozen.hold()

    def disabled(self) -> AbstractContextManager[None]:
        """Within the block the model computes as if this adapter were not there, bit for bit.

        For this thread's or task's calls alone. One that is merged, folded or has something of the model's whole is off
        for all threads, whose calls wait until the block ends.
        """
        return blocks.disabled(self)

    def unwritten(self) -> AbstractContextManager[None]:
        """Within the block nothing of this adapter is written in the base weights; afterwards again what was."""
        return blocks.unwritten(self)

    def per_example(self, names: Sequence[str | None], flattened: bool = False) -> AbstractContextManager[None]:
        """Within the block every row of a batch is computed with an adapter of its own: ``model(x)`` as ever.

        The base is computed once for all rows. Each adapter that is named adds one low-rank pass over its own rows, and
        a copy of their inputs and outputs, at each of its layers; adapters that are not named cost nothing, and add
        nothing. A layer that reads its weight (experts, ``nn.MultiheadAttention``) is called once per adapter. Every
        adapter gets the gradient of its own rows. A batch whose rows are all of one adapter gives that adapter's
        outputs. Where activations are checkpointed, ``backward`` belongs in the block too.

        Rows are indices of the first axis of what a layer is called with. If a model puts time first, a batch of as
        many examples as time steps cannot be told from one that is right. In training mode batch normalisation
        mixes rows, as always.

        Args:
            names: of an adapter of the same model for every row of the batch; ``None`` or ``"base"`` for none. Any
                adapter of the model may be asked, and any may be named.
            flattened: layers may see several rows for each example (windows, tokens, the beams or sequences of
                ``generate``), all of the first example, then all of the second, and so on. Without it such a layer is
                refused.

        Raises:
            ValueError: a name that no adapter has; parameters or statistics that an adapter has changed whole, since
                they are one for the whole batch; in the forward, a layer that does not see one row per example.
            RuntimeError: an adapter that is merged or folded, one that is named and disabled, a block within a block;
                in the forward, a weight that is read by a layer whose inputs and outputs cannot be split by examples.

        Example:
            >>> from svdpeft import LoRA, attach
            >>> model = nn.Linear(4, 3)
            >>> a, b = attach(model, LoRA(rank=1), name="a"), attach(model, LoRA(rank=2), name="b")
            >>> with a.per_example(["a", "b", None, "a"]):
            ...     model(torch.zeros(4, 4)).shape
            torch.Size([4, 3])
        """
        self._must_be("attached", "merged", "folded", "disabled")
        return by_example(self.model, self._roster.adapters, names, flattened)

    @changes
    def merge(self, permanent: bool = False, untie: bool = False, dtype: torch.dtype | None = None) -> MergeReport:
        """Write W0 + ΔW into the base weights, so that the adapted model costs what the base does.

        A copy of each weight is kept for ``unmerge``.

        Args:
            permanent: keep no copy, and take the factors out of the model: what remains is a plain model with
                merged weights, and this adapter is spent.
            untie: give a layer whose weight others share, and which alone is adapted, a weight of its own. ``unmerge``
                ties it again; merged for good it stays so, and a configuration of transformers says it.
            dtype: of a quantised model, which is dequantised to it first, all of it; ``unmerge`` gives the quantised
                one back. Into quantised weights nothing is merged: rounding would make another model.

        Returns:
            The share of each site's update that was lost in rounding to the weight's dtype.
        """
        self._must_be("attached", "folded", "disabled")
        off, self._unties, self._dtype = self.state == "disabled", untie, dtype
        if permanent:
            check_no_transform_beside(self.sites.values(), self._roster.sites())
        self.enable()
        try:
            self._to("attached")
            report = self._to("merged")
        except BaseException:
            if off:
                self.disable()
            raise
        if permanent:
            self._leave(restore=False)
        return report

    @changes
    def unmerge(self) -> None:
        """Give the base weights back, bit for bit, and add the update in the forward pass again."""
        self._must_be("merged")
        self._to("attached")
        self._unties, self._dtype = False, None

    @changes
    def merged_state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the ``state_dict`` of the plain model with W0 + ΔW, under the names that it had before the adapter.

        The model itself stays as it is. For a plain model in memory instead, call ``merge(permanent=True)``.

        Args:
            dtype: of a quantised model, as for ``merge``.

        Returns:
            Copies of all tensors of the model, those of other adapters left out.

        Raises:
            ValueError: a merged weight would not be finite.
            RuntimeError: the adapter is disabled or detached.

        Example:
            >>> model = nn.Linear(4, 3)
            >>> adapter = svdpeft.attach(model, svdpeft.LoRA(rank=1))
            >>> list(adapter.merged_state_dict())
            ['weight', 'bias']
        """
        self._must_be("attached", "merged", "folded")
        if self.state == "merged":
            return {name: tensor.detach().clone() for name, tensor in plain(self.model.state_dict()).items()}
        with self.unwritten():
            self._dtype = dtype
            try:
                self._to("merged")
                return self.merged_state_dict()
            finally:
                self._to("attached")
                self._dtype = None

    @changes
    def fold(self) -> None:
        """Write W0 − [L C A]start into the base weights: the papers' layout, one low-rank path less per layer.

        Outputs agree with the unfolded model up to rounding. A full-rank SVFT layer is then computed from its factors
        alone. Training goes on as before.
        """
        self._must_be("attached")
        check_foldable(self.sites.values())
        self._to("folded")

    @changes
    def unfold(self) -> None:
        """Give the base weights back, bit for bit."""
        self._must_be("folded")
        self._to("attached")

    @changes
    def detach(self) -> None:
        """Take everything out of the model again: parameters, buffers, hooks and flags are what they were."""
        self._must_be("attached", "merged", "folded", "disabled")
        self.enable()
        self._to("attached")
        self._leave(restore=True)

    def _to(self, state: Condition) -> MergeReport:
        """Go to a state; from "merged" and "folded" the only way is back to "attached"."""
        if state == self._state or self._state == "disabled":
            return MergeReport({})
        if state != "attached":
            check_there(self.model, self.sites.values())
            if state == "merged" and self._unties:
                self.untied = untie(self.model, self.sites.values())
            check_not_shared(self.model, list(self.sites.values()), state)
        self._state = "attached"  # which is true of all sites if this is interrupted
        try:
            if state == "merged" and self._dtype is not None:
                dequantise(self._roster, self._dtype)
            report = go(list(self.sites.values()), state)
            self._state = state
        finally:
            if self._state == "attached":
                tie_again(self.untied)
                self.untied = []
                quantise_again(self._roster)
        return report

    @torch.no_grad()
    def _leave(self, restore: bool) -> None:
        roster = self._roster
        for site in self.sites.values():
            if not restore:
                site.weight.keep(site)
            site.remove()
        if not restore:
            stay_plain(roster)
        self.own.leave(restore)
        if self.frozen:
            self.frozen.release()
        self._guard.remove()
        del roster.adapters[self.name]
        self._state = "detached"
        if roster.adapters:
            roster.freeze()
            return
        unwatch(self.model)
        SavePretrained.leave(self.model)
        delattr(self.model, ROSTER)
        roster.release()

    @property
    def _roster(self) -> Roster[Adapter]:
        return getattr(self.model, ROSTER)

    def _must_be(self, *states: Condition) -> None:
        must_be(self, *states)

    # -- training -------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimizer steps so far, of this training."""
        return self._steps.taken

    @steps.setter
    def steps(self, taken: int) -> None:
        self._steps.taken = taken

    def penalty(self) -> Tensor | None:
        """Return what the methods add to the loss, a differentiable scalar, or ``None`` where there is nothing."""
        return self._steps.penalty()

    def before_step(self, peak_lr: float, total_steps: int | None = None, gradients: str | Rule | None = None) -> None:
        """Let the methods change the gradients: after clipping, before the optimizer's step.

        Args:
            peak_lr: the largest learning rate of the schedule.
            total_steps: optimizer steps of the whole training, for methods with a schedule of their own.
            gradients: a rule for L and A beside that: ``"riemannian"``, ``"lora-pro"`` or a function
                (``svdpeft.adapter.gradients``); refused by a ``ValueError`` where a method has no such two factors.
        """
        self._steps.before(peak_lr, total_steps, rule_for(gradients, self.methods) if gradients is not None else None)

    def after_step(self, lr_scale: float = 1.0, total_steps: int | None = None) -> None:
        """Let the methods change the factors after the optimizer's step, before the gradients are cleared.

        Args:
            lr_scale: lr_t / lr_peak, where the schedule is now.
            total_steps: as in ``before_step``; default what it was told there.

        Raises:
            RuntimeError: a method needs ``before_step`` and it was not called.
        """
        self._steps.after(lr_scale, total_steps)

    # -- files ----------------------------------------------------------------------------------------------------

    def contents(self) -> Contents:
        """Return what is written of the adapter.

        Raises:
            RuntimeError: the adapter is detached.
        """
        if self.state == "detached":
            raise RuntimeError(f"adapter {self.name!r} is detached: it cannot be saved now")
        check_there(self.model, self.sites.values(), self.whole)
        values = {**self.own.changed(), **{name: self.own[name] for name in self.whole}}
        rules = list(zip(self.patterns, self.methods, strict=True))
        return Contents(
            self.name, self.model, rules, self.sites, list(self.whole), values, self.skipped, self.batch_norm
        )

    def state_dict(self) -> State:
        """Return the adapter as it would be saved, in memory; ``svdpeft.load`` takes it as it takes a folder.

        Returns:
            Copies of the ``tensors``, and the header as ``metadata``: what ``safetensors`` writes into one file.

        Example:
            >>> adapter = svdpeft.attach(nn.Linear(4, 3), svdpeft.LoRA(rank=1))
            >>> tensors, metadata = adapter.state_dict()
            >>> sorted(tensors), list(metadata)
            (['/A', '/L'], ['adapter.json'])
        """
        return to_state(self.contents())

    def load_state_dict(self, source: Source, check_base: bool = True) -> None:
        """Take another adapter's values into the tensors of this one: nothing is compiled or captured again.

        Args:
            source: what ``state_dict`` gave, a folder or a file; this adapter may be in any state. Of the same methods
                and ranks; where this adapter is a LoRA, of any methods whose updates have at most its rank. A LoRA has
                no update at sites that the values do not have; whole parameters that they do not have are the base's.
            check_base: as for ``svdpeft.load``.

        Raises:
            CheckpointError: the values are of another base or do not fit. Nothing has changed then.
        """
        before = self._state
        try:
            with turns(self.model).preparing("load_state_dict()"):
                swap_in(self.model, self.sites, self.own, source, check_base, self.unwritten)
        except BaseException:
            self._to(before)
            raise

    def save(self, path: str | os.PathLike[str], bases: Bases = "auto") -> None:
        """Write the adapter into the folder ``path``, replacing an adapter that is there.

        What is saved does not depend on whether it is merged or folded. A crash leaves the old folder or the new one.

        Args:
            path: of the folder.
            bases: whether the file holds frozen bases. ``"derived"``: no, they are found again in the weights at load,
                which costs decompositions, and proved to be the same. ``"stored"``: yes. ``"auto"``: not those that
                take more than a quarter of the bytes of their weights (SVFT, SVF, SVDiff), where they can be found.

        Raises:
            FileExistsError: ``path`` exists and is not an adapter folder.
            RuntimeError: the adapter is detached.
            ValueError: ``"derived"``, and a site's bases cannot be found again.
        """
        save(self.contents(), path, bases)
