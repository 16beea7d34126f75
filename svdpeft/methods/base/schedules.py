"""A strength that changes in the course of a training: by a schedule, or held by a controller."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from svdpeft.methods.base.hyperparameters import check_numbers
from svdpeft.methods.base.progress import Progress

CORRECTION = 0.05  # of the controller: what a ratio of error and target does to its memory, as an exponent
REACH = 10.0  # the ratio is cut to [1/10, 10]


@dataclass(frozen=True)
class Schedule:
    """γ goes from one value to another over the training.

    Args:
        start: γ of the first step.
        end: γ of the last.
        shape: ``"linear"`` or ``"cosine"``.

    Example:
        >>> [round(Schedule(1.0, 0.0).at(Progress(step, total=5)), 2) for step in range(1, 6)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """

    start: float
    end: float = 0.0
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("start", "end"):
            if getattr(self, name) < 0:
                raise ValueError(f"gamma: {name} {getattr(self, name)} is negative")
        if self.shape not in ("linear", "cosine"):
            raise ValueError(f"gamma: shape {self.shape!r} is neither 'linear' nor 'cosine'")

    def at(self, progress: Progress) -> float:
        """Return γ of one step."""
        if progress.total is None:
            raise RuntimeError(
                "a schedule of gamma needs the number of optimizer steps: adapter.after_step(lr_scale, total_steps=…)"
            )
        share = min((progress.step - 1) / max(progress.total - 1, 1), 1.0)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share

    def after(
        self, state: Float[Tensor, " 1"] | None, progress: Progress, error: Callable[[], Tensor]
    ) -> Float[Tensor, " 1"]:
        """Return γ of the step after this one, and nothing else that is kept, (1,)."""
        following = Progress(progress.step + 1, progress.total)
        return torch.tensor([self.at(following)], dtype=torch.float64)  # on the CPU: a number to every device


@dataclass(frozen=True)
class Adaptive:
    """γ is what holds the mean error at a target.

        γ = g ρ        g ← g ρ^0.05        ρ = error / target, cut to [1/10, 10];  both within [low, high]

    g finds the strength that the training asks for, whatever its learning rate; ρ damps. In mode "decoupled" no step
    is longer than that of Newton and Schulz to the nearest orthonormal basis, so that none overshoots. A target far
    below what one optimizer step adds to the error cannot be held.

    Args:
        target: of the mean of ‖QᵀQ − I‖_F over all bases of the method.
        start: γ of the first step.
        low: γ is never smaller.
        high: γ is never larger.
    """

    target: float
    start: float = 4e-4
    low: float = 1e-8
    high: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.target <= 0:
            raise ValueError(f"gamma: target {self.target} is not positive; mode='retract' holds it at zero")
        if not 0 < self.low <= self.start <= self.high:
            raise ValueError(f"gamma: start {self.start} is outside [{self.low}, {self.high}], or low is not positive")

    def after(
        self, state: Float[Tensor, " 2"] | None, progress: Progress, error: Callable[[], Tensor]
    ) -> Float[Tensor, " 2"]:
        """Return γ of the next step and g, (2,), without a word to the host."""
        ratio = (error() / self.target).float().clamp(1 / REACH, REACH)
        g = torch.full_like(ratio, self.start) if state is None else state[1].to(ratio.device)
        g = (g * ratio**CORRECTION).clamp(self.low, self.high)
        return torch.stack([(g * ratio).clamp(self.low, self.high), g])


def read_gamma(value: float | Schedule | Adaptive | Mapping[str, Any]) -> float | Schedule | Adaptive:
    """Return a strength, which files write as a number or as a mapping; the one with a target is adaptive."""
    if isinstance(value, Mapping):
        try:
            return (Adaptive if "target" in value else Schedule)(**value)
        except TypeError as error:
            raise ValueError(f"gamma {dict(value)}: {error}") from error
    if isinstance(value, (Schedule, Adaptive)):
        return value
    if isinstance(value, (str, bool)):
        raise ValueError(f"gamma {value!r} is neither a number, a Schedule nor an Adaptive")
    if value < 0:
        raise ValueError(f"gamma {value} is negative")
    return value
