"""What was chosen to be adapted, and why the rest is left."""

from __future__ import annotations

from dataclasses import dataclass, field

from svdpeft.methods.base import PerSite
from svdpeft.sites.place import Place
from svdpeft.targets.pairs import Half


class NotDefined(ValueError):
    """The method is not defined on what it was to adapt: it works on attention, or on inputs, and there are none."""


@dataclass(frozen=True)
class Choice:
    """One weight, or one part of it, that will be adapted: where it is used, and by which method."""

    name: str
    places: list[Place]
    method: PerSite
    part: str = ""
    roles: tuple[str, ...] = ()
    half: Half | None = None  # of a pair of weights, for methods that work on pairs


@dataclass
class Selection:
    """What ``select`` found; ``skipped`` says of every weight with a matrix that is left, why."""

    choices: list[Choice] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
