"""Jobs on a Ray cluster."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from svdpeft.compare.backends.outcome import TRIES, Outcome, attempt, failed


def outcomes(
    function: Callable[[Any], Any],
    jobs: Sequence[Any],
    workers: int | None,
    address: str | None,
    on_start: Callable[[Any], None],
) -> Iterator[Outcome]:
    """Do jobs as tasks of the cluster at ``address``, or of the one that is connected; at most ``workers`` at once."""
    try:
        import ray
        from ray import exceptions
    except ImportError as error:
        raise ImportError("backend='ray' needs Ray: pip install \"svdpeft[ray]\"") from error

    def run() -> Iterator[Outcome]:
        own = not ray.is_initialized()
        if own:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        waiting, running = deque(jobs), {}
        try:
            cpus, gpus = share([node["Resources"] for node in ray.nodes() if node["Alive"]], workers)
            task = ray.remote(max_retries=TRIES - 1, num_cpus=cpus, num_gpus=gpus)(attempt)
            while waiting or running:
                while waiting and len(running) < (workers or math.inf):
                    job = waiting.popleft()
                    on_start(job)
                    running[task.remote(function, job)] = job
                (ended,), _ = ray.wait(list(running))
                job = running.pop(ended)
                try:
                    outcome = dataclasses.replace(ray.get(ended), job=job)
                except exceptions.RayTaskError as error:  # a result that cannot be pickled
                    outcome = failed(job, error.cause)
                except exceptions.RayError as error:
                    reason = next(iter(str(error).splitlines()), "")
                    outcome = Outcome(job, None, f"WorkerDied: {type(error).__name__}: {reason}")
                yield outcome
        finally:
            for each in running:
                ray.cancel(each, force=True)
            if own:
                ray.shutdown()

    return run()


def share(nodes: Sequence[Mapping[str, float]], workers: int | None) -> tuple[int, float]:
    """Return how many processors and GPUs each of ``workers`` jobs gets, from what each node has.

    Example:
        >>> share([{"CPU": 8}, {"CPU": 4}], 3)
        (4, 0)
        >>> share([{"CPU": 8, "GPU": 2}, {"CPU": 4}], 4)
        (2, 0.5)
        >>> share([{"CPU": 8, "GPU": 2}], None)
        (1, 1)
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if workers is None:
        return 1, min(1, gpus)
    sizes = [int(node.get("CPU", 0)) for node in nodes if node.get("GPU") or not gpus]
    fitting = [n for n in range(1, max(sizes, default=0) + 1) if sum(size // n for size in sizes) >= workers]
    return max(fitting, default=1), 1 / math.ceil(workers / gpus) if gpus else 0
