"""Rank allocation: the triplets of all sites share one budget, which is spent on those that matter most.

    b(t) = b₀                                                          t <= t_i
           b_T + (b₀ − b_T)(1 − (t − t_i)/(T − t_i − t_f))³            t_i < t <= T − t_f, then b_T
    I(w) = |w ∂loss/∂w|        Ī ← β₁Ī + (1 − β₁)I        Ū ← β₂Ū + (1 − β₂)|I − Ī|        s(w) = Ī Ū
    S_i  = s(C_i) + mean_j s(L_ji) + mean_j s(A_ij)       over what trains of L, C and A

The b(t) triplets with the largest S_i stay, over all sites; the update of every other one is set to zero. It can grow
back until the last t_f steps, in which the choice is fixed.

Q. Zhang, M. Chen, A. Bukharin, N. Karampatziakis, P. He, Y. Cheng, W. Chen, T. Zhao. Adaptive Budget Allocation for
Parameter-Efficient Fine-Tuning. ICLR 2023, arXiv:2303.10512. For factors that start from the weight, w in I(w) is the
distance from the start, which is what is lost when the triplet returns there: ours, the paper has no such factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from svdpeft.methods.base.factors import Factors, by_shape
from svdpeft.methods.base.hyperparameters import check_numbers
from svdpeft.methods.base.progress import Progress
from svdpeft.registry import near_miss

AXES = {"L": -2, "C": None, "A": -1}  # of a factor, over which the entries of one triplet are averaged
MEAN, SPREAD, KEPT = "importance", "uncertainty", "kept"  # names in Factors.memory


@dataclass(frozen=True)
class Budget:
    """AdaLoRA's cubic budget, for every method whose update is a sum of triplets.

    Args:
        target_rank: triplets that stay per matrix, in the mean over all sites; ``None``: two thirds of those there are.
        t_initial: steps before the first is left out.
        t_final: steps at the end in which the choice is fixed.
        interval: steps from one choice to the next.
        beta1: of the mean importance.
        beta2: of its uncertainty.
        total_steps: T; ``None``: as the trainer says.
        importance: ``"paper"``: weight and gradient of the same step. ``"code"``: the official code and PEFT, the
            weight after the optimizer's step with the gradient from before it, so that a triplet that was left out
            can come back even with an interval of 1.

    Example:
        >>> [Budget(t_initial=1, t_final=2).triplets(t, total=7, first=12, last=8) for t in range(1, 8)]
        [12, 9, 8, 8, 8, 8, 8]
    """

    target_rank: float | None = None
    t_initial: int = 0
    t_final: int = 0
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    total_steps: int | None = None
    importance: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.target_rank is not None and self.target_rank <= 0:
            raise ValueError(f"target_rank {self.target_rank} is not positive")
        for name, least in (("t_initial", 0), ("t_final", 0), ("interval", 1), ("total_steps", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} {value} is less than {least}")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} {getattr(self, name)} is outside [0, 1)")
        if self.importance not in ("paper", "code"):
            raise ValueError(f"importance {self.importance!r} is neither 'paper' nor 'code'")
        if self.total_steps is not None:
            self._last_choice(self.total_steps)

    @classmethod
    def of(cls, value: Budget | Mapping[str, Any]) -> Budget:
        """Return a budget, which files write as a mapping."""
        if isinstance(value, Budget):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"allocate={value!r} is neither a Budget nor a mapping of its fields")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in value:
            if name not in known:
                raise ValueError(f"allocate has no field {name!r}: {near_miss(name, known)}")
        return cls(**value)

    def triplets(self, step: int, total: int, first: int, last: int) -> int:
        """Return b(t).

        Args:
            step: t, from 1.
            total: T.
            first: b₀, the number of triplets there are.
            last: b_T, the number that stays.
        """
        if step <= self.t_initial:
            return first
        if step >= total - self.t_final:
            return last
        left = 1 - (step - self.t_initial) / (total - self.t_final - self.t_initial)
        return int((first - last) * left**3 + last)

    def kept(self, first: int, matrices: int) -> int:
        """Return b_T, the number of triplets that stay of ``first`` in a number of matrices.

        Raises:
            ValueError: none, or more than there are.
        """
        if self.target_rank is None:
            return max(first * 2 // 3, 1)
        last = int(round(self.target_rank * matrices, 9))  # 0.29 · 100 is a little less than 29
        if not 0 < last <= first:
            raise ValueError(
                f"target_rank {self.target_rank} is {last} triplets of the {first} in {matrices} matrices: it must "
                "leave at least one, and at most as many as the rank gives"
            )
        return last

    def before_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        """Look at the gradients that the optimizer will use."""
        total = self._total(progress)
        if progress.step == 1:  # a training that begins knows nothing of an earlier one
            self.kept(sum(f.L[..., 0, :].numel() for f in sites), sum(f.L[..., 0, 0].numel() for f in sites))
            for f in sites:
                _forget(f)
        if self.importance == "paper" and (progress.step <= self._last_choice(total) or KEPT not in sites[0].memory):
            self._measure(sites)

    def after_step(self, sites: Sequence[Factors], pruned: Sequence[str], progress: Progress) -> None:
        """Set the update of the triplets to zero that the budget has no room for.

        Args:
            sites: all sites of the method.
            pruned: names of the factors that go back to their start.
            progress: where the training is.
        """
        step, total = progress.step, self._total(progress)
        last = self._last_choice(total)
        if self.importance == "code" and (step < last or not sites[0].memory):  # a first and last step looks, too
            self._measure(sites)
        if step < last:
            due = step > self.t_initial and step % self.interval == 0
            kept = self._choose(sites, step, total) if due else []
        elif KEPT in sites[0].memory:
            kept = [f.memory[KEPT] for f in sites]
        else:
            kept = self._choose(sites, step, total)
            for f, keep in zip(sites, kept, strict=True):
                _forget(f)
                f.memory[KEPT] = keep
        for f, keep in zip(sites, kept, strict=False):
            _prune(f, pruned, keep)

    def _total(self, progress: Progress) -> int:
        total = self.total_steps or progress.total
        if total is None:
            raise RuntimeError(
                "rank allocation needs the number of optimizer steps: allocate=Budget(total_steps=…), or "
                "adapter.before_step(…, total_steps=…)"
            )
        return total

    def _last_choice(self, total: int) -> int:
        if self.t_initial >= (last := total - self.t_final):
            raise ValueError(
                f"t_initial {self.t_initial} and t_final {self.t_final} leave none of {total} steps to choose in"
            )
        return last

    @torch.no_grad()
    def _measure(self, sites: Sequence[Factors]) -> None:
        """Bring the two averages of every weight up to date, one batched call per shape."""
        found = [(f, name) for f in sites for name in AXES if name in f.trains]
        weights = [getattr(f, name) for f, name in found]
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        # Of a step whose gradients overflowed (fp16) nothing is learned; the host never waits for the answer.
        peaks = [peak.to(weights[0].device) for peak in torch._foreach_norm(gradients, float("inf"))]
        finite = torch.stack(peaks).isfinite().all()
        for group in by_shape(weights):
            w = torch.stack([_moved(*found[i]) for i in group])
            g = torch.stack([gradients[i] for i in group]).to(w.dtype)
            mean, spread = (
                torch.stack([_remembered(*found[i], what, w.dtype) for i in group]) for what in (MEAN, SPREAD)
            )
            now = (w * g).abs()
            new_mean = self.beta1 * mean + (1 - self.beta1) * now
            new_spread = self.beta2 * spread + (1 - self.beta2) * (now - new_mean).abs()
            ok = finite.to(w.device)
            for what, old, new in ((MEAN, mean, new_mean), (SPREAD, spread, new_spread)):
                for i, value in zip(group, torch.where(ok, new, old), strict=True):
                    f, name = found[i]
                    f.memory[f"{what}.{name}"] = value

    @torch.no_grad()
    def _choose(self, sites: Sequence[Factors], step: int, total: int) -> list[Tensor]:
        """Return per site which triplets stay, (*b, r). The number that stays is exact: of equal ones the first."""
        scores = [_score(f) for f in sites]
        first = sum(score.numel() for score in scores)
        last = self.kept(first, sum(score[..., 0].numel() for score in scores))
        flat = torch.cat([score.flatten().to(scores[0].device) for score in scores])
        order = flat.argsort(descending=True, stable=True)[: self.triplets(step, total, first, last)]
        keep = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, order, True)
        parts = keep.split([score.numel() for score in scores])
        return [part.view(score.shape).to(score.device) for part, score in zip(parts, scores, strict=True)]


def _moved(f: Factors, name: str) -> Tensor:
    """What would be lost if the factor went back to its start: itself, where that is not kept."""
    w, start = getattr(f, name), f._parameters.get(f"{name}0")
    w = w if start is None else w - start
    return w.to(torch.promote_types(w.dtype, torch.float32))


def _remembered(f: Factors, name: str, what: str, dtype: torch.dtype) -> Tensor:
    w = getattr(f, name)
    found = f.memory.get(f"{what}.{name}")
    return torch.zeros_like(w, dtype=dtype) if found is None else found.to(w.device, dtype)


def _score(f: Factors) -> Tensor:
    """S_i of every triplet of a site, (*b, r)."""
    terms = []
    for name, axis in AXES.items():
        if name in f.trains:
            s = f.memory[f"{MEAN}.{name}"] * f.memory[f"{SPREAD}.{name}"]
            terms.append(s if axis is None else s.mean(axis))
    return torch.stack(terms).sum(0)


@torch.no_grad()
def _prune(f: Factors, names: Sequence[str], keep: Tensor) -> None:
    """Put the factors of the triplets that do not stay back to their start, zero where none is kept."""
    for name in names:
        w, start, axis = getattr(f, name), f._parameters.get(f"{name}0"), AXES[name]
        stays = (keep if axis is None else keep.unsqueeze(axis)).to(w.device)
        w.copy_(torch.where(stays, w, torch.zeros_like(w) if start is None else start))


def _forget(f: Factors) -> None:
    for name in list(f.memory):
        if name.partition(".")[0] in (MEAN, SPREAD, KEPT):
            del f.memory[name]
