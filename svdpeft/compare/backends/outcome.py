"""What becomes of a job."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

TRIES = 2  # of a job whose worker dies


@dataclass(frozen=True)
class Outcome(Generic[Job, Result]):
    """What became of a job.

    Args:
        job: as it was given.
        result: what the function returned; ``None`` if it failed.
        error: why it failed: the function's exception, or ``"WorkerDied: …"``.
        traceback: of the function's exception.
    """

    job: Job
    result: Result | None
    error: str | None = None
    traceback: str = ""


def failed(job: Job, error: BaseException) -> Outcome[Job, Any]:
    """Return the outcome of a job that raised; called where the exception is handled."""
    return Outcome(job, None, f"{type(error).__name__}: {error}", traceback.format_exc())


def attempt(function: Callable[[Job], Result], job: Job) -> Outcome[Job, Result]:
    """Do a job; an exception is its outcome."""
    try:
        return Outcome(job, function(job))
    except Exception as error:
        return failed(job, error)
