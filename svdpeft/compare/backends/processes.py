"""Jobs in several processes of this machine.

Each process does one job at a time and has a connection of its own, so that it is known which job was in the hands of
a process that died. (A pool with one queue for all knows only that some process did.)
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from svdpeft.compare.backends.outcome import TRIES, Outcome, attempt, failed

GRACE = 5.0  # seconds that a process has to end when it is asked to
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}  # they would run over the caller's bar


def outcomes(
    function: Callable[[Any], Any],
    jobs: Sequence[Any],
    workers: int,
    gpus: Sequence[str],
    on_start: Callable[[Any], None],
) -> Iterator[Outcome]:
    """Do jobs in ``workers`` processes, which share ``gpus`` in turn."""
    threads = str(max(1, torch.get_num_threads() // max(1, workers)))
    environments = [{"OMP_NUM_THREADS": threads, **QUIET} for _ in range(workers)]
    for i, environment in enumerate(environments if gpus else ()):
        environment["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)]
    crew = [_Worker(function, environment) for environment in environments]
    waiting = deque((job, 1) for job in jobs)
    # Jobs whose worker died come last and alone: memory is what most die of, and not only their own.
    again: deque[tuple[Any, int]] = deque()

    def begin(worker: _Worker, queue: deque[tuple[Any, int]]) -> None:
        job, tries = queue.popleft()
        on_start(job)
        worker.begin(job, tries)

    def stop() -> None:
        for worker in crew:
            worker.stop()
        for worker in crew:
            worker.join()

    # An exception's traceback may hold the loop, and with it this frame, until the interpreter ends.
    atexit.register(stop)
    try:
        while waiting or again or any(worker.busy for worker in crew):
            for worker in crew:
                if waiting and not worker.busy:
                    begin(worker, waiting)
            if again and not any(worker.busy for worker in crew):
                begin(crew[0], again)
            for worker in _ended(crew):
                outcome = worker.end()
                if outcome is not None:
                    yield outcome
                elif worker.tries < TRIES:
                    again.append((worker.job, worker.tries + 1))
                else:
                    reason = f"WorkerDied: {worker.death} at try {worker.tries} of {TRIES}"
                    yield Outcome(worker.job, None, reason)
    finally:
        atexit.unregister(stop)
        stop()


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` calls them."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


class _Worker:
    """A process that does one job after another; made anew if it died.

    Args:
        function: of a job.
        environment: variables of the process.
    """

    connection: Connection

    def __init__(self, function: Callable[[Any], Any], environment: Mapping[str, str]) -> None:
        self.function, self.environment = function, environment
        self.process: SpawnProcess | None = None
        self.busy = False
        self.job: Any = None
        self.tries = 0
        self.death = ""

    def begin(self, job: Any, tries: int) -> None:
        """Hand over a job."""
        if self.process is not None and self.process.exitcode is not None:
            self.join()
        if self.process is None:
            context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
            self.connection, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self.function))
            with _environment(self.environment):  # before it imports torch, which reads them once
                process.start()
            self.process = process
            theirs.close()
        self.job, self.tries, self.busy = job, tries, True
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has just died: ``end`` finds out
            self.connection.send(job)

    @property
    def ended(self) -> bool:
        """Whether the answer is there, or there will be none."""
        return self.process is not None and (self.connection.poll() or self.process.exitcode is not None)

    def end(self) -> Outcome | None:
        """Take the job back: with its outcome, or without one if the process died."""
        self.busy = False
        try:
            if self.connection.poll():
                return dataclasses.replace(self.connection.recv(), job=self.job)
        except (EOFError, OSError):  # closed before, or in the middle of, the answer
            pass
        self.join()
        return None

    def stop(self) -> None:
        """Ask the process to end."""
        if self.process is not None:
            if self.busy:
                self.process.terminate()
            self.connection.close()

    def join(self) -> None:
        """Wait for the end of the process, not for long, and note how it came."""
        if self.process is None:
            return
        self.process.join(GRACE)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        code = self.process.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else ""
        self.death = f"the worker was killed by {name}" if name else f"the worker ended with status {code}"
        self.death += " (out of memory?)" if name == "SIGKILL" else ""
        self.process.close()
        self.connection.close()
        self.process = None


def _ended(crew: Sequence[_Worker]) -> list[_Worker]:
    """Wait for the next workers that have an answer, or died."""
    busy = [worker for worker in crew if worker.busy]
    # Not for ever: what a process has forked may hold its connection open after its death.
    wait([worker.connection for worker in busy], timeout=1.0)
    return [worker for worker in busy if worker.ended]


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    """Do jobs until the connection is closed: the body of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from the keyboard: the parent decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that temporary files are removed
    threading.Thread(target=_follow, daemon=True).start()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        outcome = attempt(function, job)
        try:
            connection.send(outcome)
        except Exception as error:  # a result that cannot be pickled
            connection.send(failed(job, error))


def _follow() -> None:
    """Do not outlive a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
