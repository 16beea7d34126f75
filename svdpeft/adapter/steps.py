"""What the methods of an adapter do around a training step: a term of the loss, before and after the optimizer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from svdpeft.adapter.assembling import assembled, in_place
from svdpeft.adapter.gradients import Rule, correct
from svdpeft.methods.base import Factors, PerSite, Progress
from svdpeft.sites.shards import gathered
from svdpeft.sites.site import Site


class Steps:
    """The steps of one training, every method with all its sites: one batched call, whatever their ranks.

    Args:
        sites: of the adapter.
    """

    def __init__(self, sites: Iterable[Site]) -> None:
        self.sites = list(sites)
        groups: dict[str, tuple[PerSite, list[Factors]]] = {}
        for site in self.sites:
            groups.setdefault(repr(site.method.general()), (site.method, []))[1].append(site.factors)
        self.groups = list(groups.values())
        self.taken = 0  # optimizer steps so far
        self._begun = False  # ``before`` was called for the step that comes
        self._total: int | None = None  # steps of the whole training, where somebody has said

    def penalty(self) -> Tensor | None:
        """Return what the methods add to the loss, or ``None``."""
        terms = [t for method, factors in self.groups if (t := method.penalty(assembled(factors))) is not None]
        return torch.stack(terms).sum() if terms else None

    @torch.no_grad()
    def _bad(self) -> list[nn.Parameter]:
        """The parameters whose gradients are not finite."""
        every = [p for _, factors in self.groups for f in factors for p in f.parameters() if p.grad is not None]
        gradients = [p.grad for p in every if p.grad is not None]
        if not gradients or torch.isfinite(gathered(get_total_norm(gradients))):
            return []
        return [p for p, grad in zip(every, gradients, strict=True) if not torch.isfinite(gathered(grad)).all()]

    def before(self, peak_lr: float, total: int | None, rule: Rule | None = None) -> None:
        """Let the methods change the gradients, and then a rule."""
        self._total = total
        self._begun = True
        if self._bad():  # what a scaler of float16 leaves out; of others nothing is to be learnt either
            return
        progress = Progress(self.taken + 1, total, peak_lr=peak_lr)
        for method, factors in self.groups:
            with in_place(factors, gradients=True) as whole:
                method.before_step(whole, progress)
        if rule is not None:
            correct(rule, self.sites)

    def after(self, lr_scale: float, total: int | None) -> None:
        """Let the methods change the factors; a step that a scaler of float16 has left out is none."""
        if any(torch.isfinite(gathered(p)).all() for p in self._bad()):  # an optimizer would have spread it
            self._begun = False
            return
        progress = Progress(self.taken + 1, total or self._total, lr_scale=lr_scale)
        for method, factors in self.groups:
            if method.changes_gradients and not self._begun:
                raise RuntimeError(f"{method} acts on the gradients: call adapter.before_step(peak_lr) before the step")
            with in_place(factors, gradients=method.keeps_state) as whole:  # of them a budget makes its averages
                method.after_step(whole, progress)
            for f in factors:
                f.settle()
        self.taken += 1
        self._begun = False
