"""The learning rates that were tried before the runs, and the one that was chosen."""

from __future__ import annotations

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


def tried(trial: Record, epochs: float) -> Tried:
    """What the record of a trial says; ``epochs`` are those of a whole training."""
    value = trial.get("value")
    words = {"undefined": "not defined", "error": "failed", "diverged": "diverged"}
    why = next((word for key, word in words.items() if key in trial), "not a number")
    share = min(1.0, trial["identity"]["epochs"] / epochs)
    rate, why = trial["identity"]["lr"], "" if value is not None else why
    return Tried(rate, trial["rung"], share, value, why, trial.get("error", ""))
