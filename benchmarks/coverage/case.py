"""One model to check: where it comes from, and how it is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

Built = tuple[nn.Module, Callable[[nn.Module], Any]]  # a model, and what runs it once


@dataclass(frozen=True)
class Case:
    """One model.

    Args:
        family: that it stands for.
        label: that tells it from others of its family.
        make: build it.
        idle: names of sites (a pattern) that it computes and then ignores, so that no adapter there can have an
            effect, and why.
    """

    family: str
    label: str
    make: Callable[[], Built]
    idle: tuple[str, str] = ("", "")
