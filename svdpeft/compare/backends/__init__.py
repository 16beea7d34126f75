"""Where the runs of a comparison are done: here, in several processes of this machine, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from svdpeft.compare.backends.outcome import Job, Outcome, Result, attempt
from svdpeft.registry import near_miss

BACKENDS = ("local", "ray")


def map_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    backend: str = "local",
    workers: int | None = None,
    address: str | None = None,
    on_start: Callable[[Job], None] | None = None,
) -> Iterator[Outcome[Job, Result]]:
    """Do jobs, several at once, and give each outcome when it is there.

    A job that raises does not stop the others. A job whose worker dies (out of memory, a machine that is gone) is
    taken up once more; if that one dies too, it has failed. Leaving the loop, an interrupt included, stops the workers.

    Args:
        function: of a job. More than one worker, and Ray, need one that can be pickled: of a module's top level.
        jobs: likewise.
        backend: ``"local"``, or ``"ray"`` for a cluster.
        workers: how many jobs are done at once; GPUs and processors are shared evenly. ``None``: locally one for each
            GPU, or one; with Ray as many as there is room for, each with one processor and, where there are any, one
            GPU. One local worker is this process.
        address: of a Ray cluster. ``None`` is the one that runs here, or a new one.
        on_start: called with a job when it is handed to a worker, or to Ray's scheduler.

    Returns:
        One outcome for every job, in the order in which they end.

    Raises:
        ValueError: an unknown backend, less than one worker, an address for the local backend.
        ImportError: Ray is not installed.

    Example:
        >>> [outcome.result for outcome in map_jobs(abs, [-2, 3])]
        [2, 3]
        >>> next(map_jobs(int, ["a"])).error
        "ValueError: invalid literal for int() with base 10: 'a'"
    """
    if backend not in BACKENDS:
        raise ValueError(f"no backend is called {backend!r}: {near_miss(backend, BACKENDS)}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: at least one is needed")
    start = on_start or (lambda job: None)
    if backend == "ray":
        from svdpeft.compare.backends import cluster

        return cluster.outcomes(function, jobs, workers, address, start)
    if address is not None:
        raise ValueError(f"address={address!r} is of a Ray cluster: it needs backend='ray'")
    from svdpeft.compare.backends import processes

    if in_process(backend, workers):
        return _here(function, jobs, start)
    gpus = processes.visible_gpus()
    return processes.outcomes(function, jobs, min(workers or len(gpus), len(jobs)), gpus, start)


def in_process(backend: str, workers: int | None) -> bool:
    """Whether ``map_jobs`` calls the function in this very process, so that it need not be pickled.

    Example:
        >>> in_process("local", 1), in_process("local", 2), in_process("ray", 1)
        (True, False, False)
    """
    from svdpeft.compare.backends import processes

    # One worker beside several GPUs is a process too: it must see one of them, else the batch is spread over all.
    return backend == "local" and max(workers or 0, len(processes.visible_gpus())) <= 1


def _here(
    function: Callable[[Job], Result], jobs: Sequence[Job], on_start: Callable[[Job], None]
) -> Iterator[Outcome[Job, Result]]:
    for job in jobs:
        on_start(job)
        yield attempt(function, job)
