"""One training of a comparison, and what is measured on it."""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.loading import load as reload
from svdpeft.analysis import DriftTracker
from svdpeft.compare import budget, measures
from svdpeft.compare.spec import RECIPE, Entry, Spec
from svdpeft.decomposition import svd_cache
from svdpeft.finetuning.session import Session, Setup
from svdpeft.methods.base import Method, PerSite
from svdpeft.tasks.probes import probe
from svdpeft.training.divergence import Diverged
from svdpeft.training.memory import peak_memory, reset_peak_memory
from svdpeft.training.recipe import Recipe

SPECTRA = ("delta_sigma", "delta_d", "delta_d_assigned", "condition_principal", "orthonormality")


@dataclass(frozen=True)
class Job:
    """One training.

    Args:
        spec: the comparison.
        entry: method and learning rate.
        budget: one of the comparison's.
        seed: of initialisation, batch order and dropout.
        rung: of a search's trial; ``None`` for a run that is judged on the test split.
        share: part of the comparison's epochs that it trains.
        search: what the search found, for a run's record.
    """

    spec: Spec
    entry: Entry
    budget: str | int | None
    seed: int
    rung: int | None = None
    share: float = 1.0
    search: dict[str, Any] | None = None

    @property
    def epochs(self) -> float:
        """Passes over the training split."""
        return self.spec.epochs * self.share

    @property
    def recipe(self) -> Recipe:
        """How it trains."""
        return dataclasses.replace(self.spec.recipe(self.entry.lr, self.epochs), **self.entry.around())

    @property
    def kind(self) -> Any:
        """Where its record lies: ``"runs"`` or ``"trials"``."""
        return "runs" if self.rung is None else "trials"

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the result; two jobs with one identity are the same."""
        spec = self.spec
        same = ("model", "dtype", "head_lr", "batch_size", "image_size", "probe")
        return {
            **{name: getattr(spec, name) for name in same},
            "task": {"name": spec.task, **vars(spec.make_task())},
            "method": self.entry.method.to_json(),
            "lr": self.entry.lr,
            "seed": self.seed,
            "targets": None if spec.targets is None else list(spec.targets),
            "exclude": list(spec.exclude),
            "budget": self.budget,
            "epochs": self.epochs,
            # What an older comparison could not say is said where it is not what that did.
            **{n: value for n in RECIPE if (value := getattr(spec, n)) != Recipe.__dataclass_fields__[n].default},
            **self.entry.around(),
            **({"preserve": spec.preserve} if self._preserves else {}),
            **({"threads": spec.threads} if spec.threads is not None else {}),
            **({"snapshots": spec.snapshots} if self.rung is None else {"rung": self.rung}),
        }

    @property
    def _preserves(self) -> bool:
        return isinstance(self.entry.method, PerSite) and self.entry.method.preserves

    def __str__(self) -> str:
        budget = f" at {self.budget}" if len(self.spec.budgets) > 1 else ""
        return f"{self.entry.label}{budget}, " + (
            f"seed {self.seed}" if self.rung is None else f"rate {self.entry.lr:.2g}"
        )


class Training(Session):
    """A model with its adapter, made ready as a job says.

    Args:
        job: what to train.
    """

    adapter: Adapter
    history: list[dict[str, Any]]  # what the trainer has logged

    def __init__(self, job: Job) -> None:
        spec = job.spec
        super().__init__(
            Setup(
                spec.model,
                spec.make_task(),
                spec.targets,
                spec.exclude,
                image_size=spec.image_size,
                dtype=spec.dtype,
                seed=job.seed,
                head_lr=spec.head_lr,
                preserve=spec.preserve,
            )
        )
        self.job, self.task = job, self.setup.task

    @cached_property
    def method(self) -> Method:
        """The method, as the budget allows it."""
        return self.fitted(self.job.entry.method, self.job.budget)

    def fitted(self, method: Method, limit: str | int | None) -> Method:
        """Turn the method's knob as far as a budget allows."""
        if not isinstance(method, PerSite):
            return method
        sites = budget.sites_of(self.model, method, self.targets, self.job.spec.exclude, self.head)
        return method if limit is None else budget.fit(method, budget.parse(limit, self.base), sites)

    def attached(self, model: nn.Module) -> tuple[Adapter, float]:
        """Attach the job's method and return how many seconds that took."""
        return self.attach(model, self.method, self.job.spec.batch_size)

    def train(self, folder: Path, callbacks: Sequence[Any], report_to: str = "none") -> None:
        """Train the attached adapter."""
        trainer = self.trainer(
            self.adapter,
            self.job.recipe,
            folder,
            callbacks,
            run_name=str(self.job),
            logging_steps=1,
            save_strategy="no",
            report_to=report_to,
            disable_tqdm=True,
        )
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        try:
            trainer.train()
        finally:
            self.history = trainer.state.log_history
            if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
                wandb.finish()  # else the next training of this process would be logged as this one

    def tracker(self) -> DriftTracker | None:
        """Return what follows the spectra of the weights; ``None`` for a method that trains vectors alone."""
        new = tuple(f"{module}." for module in self.head)  # a new head has no base that it could drift from
        whole = [
            name.removesuffix(".weight")
            for name, (owner, attribute) in self.adapter.whole.items()
            if getattr(owner, attribute).ndim > 1 and not name.startswith(new)
        ]
        if not (sites := [*self.adapter.sites, *whole]):
            return None
        return DriftTracker(self.adapter, sites, every=math.ceil(self.steps() / self.job.spec.snapshots))

    def steps(self, share: float = 1.0) -> int:
        """Number of optimizer steps of a part of the training."""
        each = self.job.recipe.batches(len(self.data.train))[0]  # type: ignore[arg-type]
        return math.ceil(math.ceil(each / self.job.recipe.accumulate) * self.job.epochs * share)


def trial(job: Job, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train as the job says and judge on the validation split."""
    search = job.spec.search
    assert search is not None
    training = Training(job)
    training.adapter, _ = training.attached(training.model)
    with tempfile.TemporaryDirectory() as folder:
        training.train(Path(folder), callbacks)
    data = training.data
    # The loss, too: an accuracy can be had of logits that are no numbers.
    values = averages(data.evaluate(training.model, data.validation, (search.metric, "loss") if search.metric else ()))
    # A task may have no answers to check on its validation split: then the loss decides.
    metric = next(name for name in (search.metric, training.task.metric, "loss") if name in values)
    return {"metric": metric, "value": values[metric], **({"loss": values["loss"]} if "loss" in values else {})}


def averages(items: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the mean of every metric.

    Raises:
        Diverged: one of them is not a number.
    """
    found = {name: statistics.fmean(values) for name, values in items.items()}
    if bad := [name for name, value in found.items() if not math.isfinite(value)]:
        raise Diverged(f"after the training the {bad[0]} of the model is {found[bad[0]]}")
    return found


def run(
    job: Job,
    callbacks: Sequence[Any] = (),
    report_to: str = "none",
    log_folder: Path | None = None,
    keep: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Train as the job says, judge on the test split, once, and return all that was measured.

    Args:
        job: what to train.
        callbacks: of the trainer.
        report_to: tracker that the trainer tells its logs.
        log_folder: where a tracker that writes files writes them.
        keep: is given the folder of the trained adapter, which is gone afterwards.
    """
    held = reset_peak_memory()
    training, spec = Training(job), job.spec
    model, data = training.model, training.data
    known = probe(training.loaded, spec.probe)
    before = (known.measure(model) if known.before is None else known.before) if known else 0.0
    training.adapter, attach_seconds = training.attached(model)
    adapter = training.adapter
    tracker = training.tracker() if spec.snapshots else None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        training.train(log_folder or folder, [*callbacks, *([tracker] if tracker else [])], report_to)
        items = data.evaluate(model, data.test)
        metrics = averages(items)
        peak = peak_memory() - held
        adapter.save(folder / "adapter")
        if keep is not None:
            keep(folder / "adapter")
        record = {
            "method": {**training.method.to_json(), "text": str(training.method)},
            "metric": {"name": training.task.metric, "value": metrics[training.task.metric]},
            "metrics": metrics,
            "items": items,
            "search": job.search,
            **_sizes(training),
            "attach_seconds": attach_seconds,
            **_speed(training, {row["step"] for row in tracker.table} | {1} if tracker else set()),
            "peak_memory_bytes": peak,
            "checkpoint_bytes": sum(file.stat().st_size for file in (folder / "adapter").iterdir()),
            "forgetting": {"name": known.name, "before": before, "after": known.measure(model)} if known else None,
            "loss": [[entry["step"], entry["loss"]] for entry in _logs(training)],
            "spectra": tracker.to_json(SPECTRA) if tracker else None,
        }
        return record | _exactness(training, folder)


def _exactness(training: Training, folder: Path) -> dict[str, Any]:
    """Compare the trained model with its merged and its reloaded self, and with the base. It is merged afterwards."""
    model, data = training.model, training.data
    adapted = measures.outputs(model, data)
    found: dict[str, Any] = {"merge_error": measures.merge_error(model, training.adapter, data)}
    training.adapter.merge(permanent=True)
    again = training.load().model
    found["distance"] = measures.distance(model, again, training.head)
    with svd_cache(folder / "svd"):
        training.attached(again)[0].detach()  # fills the cache
        warm, found["attach_warm_seconds"] = training.attached(again)
    warm.detach()
    reload(again, folder / "adapter")
    return {**found, "reload_error": measures.gap(measures.outputs(again, data), adapted)}


def _sizes(training: Training) -> dict[str, Any]:
    adapter = training.adapter
    factors = adapter.trainable_count - sum(p.numel() for p in adapter.roles().get("whole", []))
    parameters = {"base": training.base, "factors": factors, "trainable": adapter.trainable_count}
    return {"parameters": parameters, "sites": len(adapter.sites)}


def _speed(training: Training, tracked: set[int]) -> dict[str, Any]:
    """Seconds per step, of steps in whose time no spectra were looked at; examples of a full batch per second."""
    logs = _logs(training)
    plain = [entry for entry in logs if entry["step"] not in tracked] or logs
    seconds = statistics.median(entry["step_time"] for entry in plain)
    unit, each = measures.units_per_example(training.data)
    batch = min(training.job.spec.batch_size, len(training.data.train))  # type: ignore[arg-type]
    throughput = {"unit": unit, "per_second": each * batch / seconds}
    return {"step_seconds": seconds, "throughput": throughput}


def _logs(training: Training) -> list[dict[str, Any]]:
    return [entry for entry in training.history if "loss" in entry]
