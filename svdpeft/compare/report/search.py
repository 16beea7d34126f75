"""The learning rates that were tried before the runs, and the one that was chosen."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from svdpeft.compare.store import Record


@dataclass(frozen=True)
class Tried:
    """One learning rate on the validation split.

    Args:
        rate: that was tried.
        rung: the last one that it reached.
        share: of the epochs that it was trained for; below 1 where halving stopped it.
        value: of the metric; ``None`` where there is none.
        why: there is none: "failed", "not defined", "diverged" or "not a number".
        error: of a failed trial.
    """

    rate: float
    rung: int
    share: float
    value: float | None
    why: str = ""
    error: str = ""


@dataclass(frozen=True)
class Search:
    """The learning rates that were tried for one method at one budget.

    Args:
        label: of the method.
        budget: as the specification says it; ``None`` where there is none.
        metric: on the validation split.
        points: one for every rate, from the least.
        chosen: the rate of the runs; ``None`` where no run is there yet, or no trial gave a value to choose by.
        free: whether the method has no factors, so that no budget holds it.
    """

    label: str
    budget: str | int | None
    metric: str
    points: tuple[Tried, ...]
    chosen: float | None
    free: bool = False

    @property
    def edge(self) -> str:
        """Which edge of the grid the chosen rate lies at: "lowest", "highest" or ""."""
        rates = [point.rate for point in self.points]
        if len(rates) < 2 or self.chosen not in (rates[0], rates[-1]):
            return ""
        return "lowest" if self.chosen == rates[0] else "highest"

    @property
    def failure(self) -> str:
        """Why the search chose nothing; "" where it did, or where the method is not defined on the model."""
        if any(p.value is not None or p.why == "not defined" for p in self.points):
            return ""
        return next((p.error for p in self.points if p.error), "no trial gave a number")


def tried(trials: Sequence[Record], epochs: float) -> Tried:
    """What the records of one rate's trials say together, those of its last rung; their mean, where all have a value.

    Args:
        trials: of one rate, one or more.
        epochs: of a whole training.
    """
    rung = max(trial["rung"] for trial in trials)
    last = [trial for trial in trials if trial["rung"] == rung]
    share = min(1.0, last[0]["identity"]["epochs"] / epochs)
    rate = last[0]["identity"]["lr"]
    if lost := next((trial for trial in last if trial.get("value") is None), None):
        words = {"undefined": "not defined", "error": "failed", "diverged": "diverged"}
        why = next((word for key, word in words.items() if key in lost), "not a number")
        return Tried(rate, rung, share, None, why, lost.get("error", ""))
    return Tried(rate, rung, share, statistics.fmean(trial["value"] for trial in last))
