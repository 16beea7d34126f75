"""Run a comparison: search the learning rates, then train every method with every seed; each into its own file."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from svdpeft.adapter.file import TENSORS
from svdpeft.compare import records
from svdpeft.compare.backends import in_process, map_jobs
from svdpeft.compare.provenance import provenance
from svdpeft.compare.run import Job, Training, run, trial
from svdpeft.compare.search import search
from svdpeft.compare.spec import Entry, Spec
from svdpeft.compare.store import Store
from svdpeft.methods.base import PerSite
from svdpeft.targets.choice import NotDefined
from svdpeft.tasks.base import higher_is_better
from svdpeft.tasks.probes import probe
from svdpeft.training.divergence import Diverged
from svdpeft.training.trackers import check_tracker

MOST = 4  # runs at once where nobody said how many: each holds a model, and torch
COLUMNS = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


@dataclass(frozen=True)
class Engine:
    """Where the trainings of a comparison happen.

    Args:
        backend: ``"local"`` or ``"ray"``.
        workers: trainings at once; ``None`` is what the backend finds.
        address: of a Ray cluster.
        tracker: that the trainer tells its logs: ``"tensorboard"``, ``"wandb"``, ``"mlflow"``, ``"trackio"``, or any
            other that transformers knows.
        keep: whose adapters stay, under ``adapters/`` beside the runs: ``"none"``, ``"all"``, or ``"best"``: of every
            line of the table the run with the best metric.
    """

    backend: str = "local"
    workers: int | None = None
    address: str | None = None
    tracker: str = "none"
    keep: Literal["none", "best", "all"] = "none"


def compare(spec: Spec, out: str | Path, engine: Engine = Engine()) -> list[dict[str, Any]]:
    """Do the trials and runs that are not there yet and return the records of all runs.

    A run that fails is recorded with its error and the others go on; an interrupt loses only the runs under way.

    Args:
        spec: what is compared.
        out: folder of the comparison, or any address that fsspec knows.
        engine: where it happens.

    Raises:
        ValueError: the folder holds another comparison; no method can meet a budget; the tracker is not there.
    """
    check_tracker(engine.tracker)
    store = Store(out)
    map_jobs(str, [], backend=engine.backend, workers=engine.workers, address=engine.address)  # refuses wrong ones
    if store.address.startswith("memory:") and not in_process(engine.backend, engine.workers):
        raise ValueError(f"{store.address} is this process's memory: other workers would not write into it")
    spec = check(spec)
    store.claim({"spec": spec.to_json(), **provenance()})
    grid = lines(spec)

    def train(trials: Sequence[Job]) -> list[dict[str, Any]]:
        _do(trials, store, engine, "trials")
        return [store.load("trials", _name(job, store)) for job in trials]

    found = search(spec, grid, train) if spec.search else {}
    jobs = []
    for seed in spec.seeds:
        for entry, limit in grid:
            result = found.get((entry.label, limit))
            chosen = replace(entry, lr=result["lr"]) if result else entry
            jobs.append(Job(spec, chosen, limit, seed, search=result))
    _do(jobs, store, engine, "runs")
    if engine.keep != "none":
        _keep(jobs, store, engine)
    return [store.load("runs", _name(job, store)) for job in jobs]


def _keep(jobs: Sequence[Job], store: Store, engine: Engine) -> None:
    """Leave the adapters that are to stay; a run that was done before without keeping its own is done again."""
    done = [(job, record) for job in jobs if "metric" in (record := store.load("runs", _name(job, store)))]
    kept = [job for job, _ in done]
    if engine.keep == "best":
        groups: dict[tuple[str, Any], list[tuple[Job, dict[str, Any]]]] = {}
        for job, record in done:
            groups.setdefault((job.entry.label, job.budget), []).append((job, record))
        kept = [max(its, key=lambda pair: _value(pair[1]))[0] for its in groups.values()]
    # The tensors are copied last: without them, who copied the adapter was killed.
    missing = [job for job in kept if not store.has_file(f"{_folder(job, store)}/{TENSORS}")]
    _do(missing, store, engine, "adapters", again=True)
    stay = {_folder(job, store) for job in kept}
    for folder in {_folder(job, store) for job in jobs} - stay:
        store.remove_folder(folder)


def _value(record: dict[str, Any]) -> float:
    """The metric of a run, more of which is better."""
    name, value = record["metric"]["name"], record["metric"]["value"]
    return -math.inf if value is None else value if higher_is_better(name) else -value


def _folder(job: Job, store: Store) -> str:
    return f"adapters/{_name(job, store)}"


def at_once(spec: Spec, backend: str = "local") -> int | None:
    """Return how many runs this machine's processors do at once; ``None`` where the backend decides.

    The results are those of one worker: every run takes the threads that the specification says. For a program that
    may start processes: the command line does, a function called from an unguarded script may not.
    """
    if backend != "local" or spec.threads is None or torch.cuda.is_available():
        return None
    return max(1, min(MOST, torch.get_num_threads() // spec.threads))


def lines(spec: Spec) -> list[tuple[Entry, Any]]:
    """Return the lines of the table: every method at every budget; one without factors has no knob, and comes once."""
    found = []
    for limit in spec.budgets:
        for entry in spec.methods:
            line = entry, limit if isinstance(entry.method, PerSite) else None
            if line not in found:
                found.append(line)
    return found


def check(spec: Spec) -> Spec:
    """Refuse what would make every run fail, before anything is trained.

    Returns:
        The specification with what only the model tells: the targets, where nobody names them.

    Raises:
        ValueError: the model, the task's sizes, what forgetting is measured on, a training of less than two steps (the
            first has a rate of zero), a budget or targets with which no method can do anything.
    """
    training = Training(Job(spec, spec.methods[0], None, 0))
    if spec.probe is not None:
        probe(training.loaded, spec.probe)
    if spec.preserve is not None:
        training.preserved()
    shares = [1.0, *(share for _, share in spec.search.rungs())] if spec.search else [1.0]
    if (steps := training.steps(min(shares))) < 2:
        raise ValueError(
            f"{len(training.data.train)} training examples in batches of {spec.batch_size} for "  # type: ignore[arg-type]
            f"{spec.epochs * min(shares):g} epochs are {steps} step, whose learning rate is 0: take more, or smaller "
            "batches"
        )
    for limit in spec.budgets:
        objections = []
        for entry in spec.methods:
            if isinstance(entry.method, PerSite):
                with suppress(NotDefined):  # its run will say so
                    objections.append(_objection(training, entry.method, limit))
        if objections and all(objections):
            what = "adapt this model" if limit is None else f"meet the budget {limit}"
            raise ValueError(f"no method can {what}: " + "; ".join(dict.fromkeys(objections)))
    return replace(spec, targets=training.targets)


def _objection(training: Training, method: PerSite, limit: str | int | None) -> str:
    """Why a method cannot be attached within a budget, or nothing."""
    try:
        training.fitted(method, limit)
    except NotDefined:
        raise
    except ValueError as error:
        return str(error)
    return ""


def _name(job: Job, store: Store) -> str:
    return store.name(job.entry.label, job.identity())


def _done(job: Job, store: Store) -> bool:
    """Whether there is a record that a report can read; else the job is done (again)."""
    return store.done(job.kind, _name(job, store), partial(records.check, job.kind))


def _perform(
    job: Job,
    store: Store,
    tracker: str,
    keep: bool = False,
    again: bool = False,
    advance: Callable[[], Any] | None = None,
) -> None:
    """Do one job, in whatever process, and write its record."""
    if not again and _done(job, store):  # by a worker that died afterwards, or by another comparison's process
        return
    callbacks = [advance()] if advance else []
    with _threads(job.spec.threads):
        record = _head(job)
        started = time.perf_counter()
        try:
            if job.rung is None:
                logs = Path(store.address if "://" not in store.address else ".", "logs", _name(job, store))
                kept = partial(store.keep_folder, _folder(job, store)) if keep else None
                record |= run(job, callbacks, tracker, logs if tracker != "none" else None, kept)
            else:
                record |= trial(job, callbacks)
        except NotDefined as reason:  # no failure: a method of attention on a CNN
            record["undefined"] = str(reason)
        except Diverged as reason:  # a result: of this method at this rate
            record["diverged"] = str(reason)
        except Exception as error:  # recorded: one method's failure does not cost the others their runs
            record |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    store.write(job.kind, _name(job, store), {**record, "seconds": time.perf_counter() - started})


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Take so many threads of the CPU inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _head(job: Job) -> dict[str, Any]:
    """What a record begins with, whatever becomes of the job."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rung = {} if job.rung is None else {"rung": job.rung}
    return {"label": job.entry.label, "identity": job.identity(), **rung, **provenance(), "date": now}


def _do(jobs: Sequence[Job], store: Store, engine: Engine, what: str, again: bool = False) -> None:
    """Do the jobs that have no result yet, or all of them again, under a progress bar."""
    missing = [job for job in jobs if again or not _done(job, store)]
    alone = in_process(engine.backend, engine.workers)
    with Progress(*COLUMNS, console=Console(stderr=True)) as progress:  # stdout is for the result
        bar = progress.add_task(what, total=len(jobs), completed=len(jobs) - len(missing))
        steps = progress.add_task("", total=None, visible=alone and bool(missing))

        def begin(job: Job) -> None:
            progress.reset(steps, description=str(job), total=None)

        keep = engine.keep != "none"
        work = partial(_perform, store=store, tracker=engine.tracker, keep=keep, again=again)
        if alone:
            work = partial(work, advance=lambda: _Advance(progress, steps))
        options = {"backend": engine.backend, "workers": engine.workers, "address": engine.address}
        for outcome in map_jobs(work, missing, on_start=begin, **options):
            job = outcome.job
            if outcome.error:  # the worker itself is gone
                failure = {"error": outcome.error, "traceback": outcome.traceback}
                store.write(job.kind, _name(job, store), {**_head(job), **failure})
            record = store.load(job.kind, _name(job, store))
            if "error" in record:
                progress.console.print(f"{job} failed: {record['error']}", style="red", markup=False, highlight=False)
            elif "diverged" in record and job.rung is None:
                progress.console.print(f"{job} diverged: {record['diverged']}", markup=False, highlight=False)
            elif "metric" in record and job.rung is None:
                progress.console.print(f"{job}: {_result(record)}", markup=False, highlight=False)
            progress.advance(bar)


def _result(record: dict[str, Any]) -> str:
    """What a run came to, for people: ``accuracy 88.5 %, 11 s``."""
    name, value = record["metric"]["name"], record["metric"]["value"]
    share = value is not None and higher_is_better(name) and 0 <= value <= 1
    text = "not a number" if value is None else f"{100 * value:.1f} %" if share else f"{value:.3f}"
    return f"{name} {text}, {record['seconds']:.0f} s"


class _Advance(transformers.TrainerCallback):
    """Move a progress bar with the trainer's steps."""

    def __init__(self, progress: Progress, bar: TaskID) -> None:
        self.progress, self.bar = progress, bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.bar, total=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.advance(self.bar)
