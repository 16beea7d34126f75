"""Where a training is, and how many optimizer steps a parameter has seen."""

from __future__ import annotations

import functools
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Progress:
    """Where a training is, for what a method does around an optimizer step.

    Args:
        step: number of the step, from 1.
        total: number of steps of the whole training; ``None`` where nobody has said.
        lr_scale: lr_t / lr_peak of the schedule.
        peak_lr: its largest learning rate; 0 where it is not known.
    """

    step: int = 1
    total: int | None = None
    lr_scale: float = 1.0
    peak_lr: float = 0.0


_steps: MutableMapping[nn.Parameter, int] = WeakIdKeyDictionary()  # of those parameters that are watched and exist


def optimizer_steps(p: nn.Parameter) -> int:
    """How many optimizer steps there were on a parameter since this was first asked.

    Not their versions: a fused optimizer does not raise them, and whoever else writes has taken no step.
    """
    _count()
    return _steps.setdefault(p, 0)


@functools.cache
def _count() -> None:
    register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if p in _steps:
            _steps[p] += 1
