"""Run a comparison: every method with every seed, one after the other, each into its own file."""

from __future__ import annotations

import statistics
import tempfile
import time
import traceback
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from svdpeft.calibration import Calibration, calibrate
from svdpeft.compare import budget
from svdpeft.compare.spec import Entry, Spec
from svdpeft.compare.store import Store, provenance
from svdpeft.install import attach
from svdpeft.methods.base import Method, PerSite
from svdpeft.models import load
from svdpeft.targets import NotDefined
from svdpeft.tasks.base import TaskData
from svdpeft.training.memory import peak_memory, reset_peak_memory
from svdpeft.training.trainer import Trainer, returns_loss

CALIBRATION_BATCHES = 8  # of training data that methods which start from data see
COLUMNS = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def compare(spec: Spec, out: Path) -> list[dict[str, Any]]:
    """Do the runs that are not there yet and return the records of all.

    A run that fails is recorded with its error and the others go on; an interrupt loses only the run under way.

    Args:
        spec: what is compared.
        out: folder of the comparison.
    """
    store, records = Store(out), []
    jobs = [(entry, seed) for seed in spec.seeds for entry in spec.methods]
    with Progress(*COLUMNS, console=Console(stderr=True)) as progress:  # stdout is for the result
        runs, steps = progress.add_task("runs", total=len(jobs)), progress.add_task("", total=None)
        for entry, seed in jobs:
            identity = identify(spec, entry, seed)
            path = store.path(entry.label, identity)
            if not store.done(path):
                progress.reset(steps, description=f"{entry.label}, seed {seed}", total=None)
                record = {"label": entry.label, "identity": identity, **provenance()}
                record["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
                started = time.perf_counter()
                try:
                    record |= run(spec, entry, seed, _Advance(progress, steps))
                except NotDefined as reason:  # no failure: a method of attention on a CNN
                    record["undefined"] = str(reason)
                except Exception as error:  # recorded: one method's failure does not cost the others their runs
                    record |= {
                        "error": f"{type(error).__name__}: {error}",
                        "traceback": traceback.format_exc(),
                    }
                    progress.console.print(f"{entry.label}, seed {seed} failed: {error}", style="red", highlight=False)
                store.write(path, {**record, "seconds": time.perf_counter() - started})
            records.append(store.load(path))
            progress.advance(runs)
    return records


def identify(spec: Spec, entry: Entry, seed: int) -> dict[str, Any]:
    """Return everything that decides a run's result; two runs with one identity are the same run."""
    task = spec.make_task()
    return {
        "model": spec.model,
        "task": {"name": spec.task, **vars(task)},
        "method": entry.method.to_json(),
        "lr": entry.lr,
        "head_lr": spec.head_lr,
        "seed": seed,
        "targets": list(spec.targets),
        "exclude": list(spec.exclude),
        "budget": spec.budget,
        "epochs": spec.epochs,
        "batch_size": spec.batch_size,
        "image_size": spec.image_size,
    }


def run(spec: Spec, entry: Entry, seed: int, advance: transformers.TrainerCallback | None = None) -> dict[str, Any]:
    """Train one method with one seed and return what was measured.

    Args:
        spec: the comparison that the run belongs to.
        entry: method and learning rate.
        seed: of initialisation, batch order and dropout.
        advance: a callback that watches the steps.
    """
    task = spec.make_task()
    transformers.set_seed(seed)
    loaded = load(spec.model, num_classes=task.num_classes, image_size=spec.image_size, seed=seed)
    model = loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    base = sum(p.numel() for p in model.parameters())
    data = task.prepare(loaded, seed)
    head = (loaded.head,) if task.num_classes is not None and loaded.head is not None else ()
    method = entry.method
    if spec.budget is not None and isinstance(method, PerSite):
        sites = budget.sites_of(model, method, spec.targets, spec.exclude)
        method = budget.fit(method, budget.parse(spec.budget, base), sites)
    reset_peak_memory()
    started = time.perf_counter()
    seen = calibration(spec, model, method, data)
    adapter = attach(model, method, spec.targets, spec.exclude, head, seed=seed, clip_rank=True, calibration=seen)
    attached = time.perf_counter() - started
    own_lr = None if method.whole(model) or not head or spec.head_lr is None else {"whole": spec.head_lr}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            adapter=adapter,
            args=arguments(spec, entry, seed, folder),
            role_lr=own_lr,
            train_dataset=data.train,
            data_collator=data.collate,
            callbacks=[advance] if advance is not None else None,
        )
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.train()
        adapter.save(Path(folder) / "adapter")
        stored = sum(file.stat().st_size for file in (Path(folder) / "adapter").iterdir())
    items = data.evaluate(model, data.test)
    metrics = {name: statistics.fmean(values) for name, values in items.items()}
    peak = peak_memory()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    factors = adapter.trainable_count - sum(p.numel() for p in adapter.roles().get("whole", []))
    return {
        "method": {**method.to_json(), "text": str(method)},
        "metric": {"name": task.metric, "value": metrics[task.metric]},
        "metrics": metrics,
        "items": items,
        "parameters": {"base": base, "factors": factors, "trainable": adapter.trainable_count},
        "sites": len(adapter.sites),
        "attach_seconds": attached,
        "step_seconds": statistics.median(entry["step_time"] for entry in logs),
        "peak_memory_bytes": peak,
        "checkpoint_bytes": stored,
        "merge_error": merge_error(model, adapter, data.collate([data.train[i] for i in range(4)])),
        "loss": [[entry["step"], entry["loss"]] for entry in logs],
    }


def calibration(spec: Spec, model: nn.Module, method: Method, data: TaskData) -> Calibration | None:
    """Show the base a few training batches, for a method that starts from data; the time counts as attaching.

    Args:
        spec: says the size of a batch, and what is adapted.
        model: the base.
        method: whose ``needs`` says what to look at.
        data: of the task.
    """
    if not isinstance(method, PerSite) or not method.needs:
        return None
    device = next(model.parameters()).device
    total = len(data.train)  # type: ignore[arg-type]
    size = min(spec.batch_size, total)

    def batches() -> Iterator[dict[str, Tensor]]:
        for i in range(min(CALIBRATION_BATCHES, total // size)):
            batch = data.collate([data.train[j] for j in range(i * size, (i + 1) * size)])
            yield {name: value.to(device) for name, value in batch.items()}

    def call(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return model(**{name: value for name, value in batch.items() if own or name != "labels"})

    def loss(output: Any, batch: dict[str, Tensor]) -> Tensor:
        return output.loss if own else cross_entropy(output, batch["labels"])

    own, gradients = returns_loss(model), method.needs == "gradients"
    return calibrate(
        model, batches(), spec.targets, spec.exclude, inputs=not gradients, gradients=gradients, loss=loss, call=call
    )


def arguments(spec: Spec, entry: Entry, seed: int, folder: str) -> transformers.TrainingArguments:
    """Return the trainer's arguments: AdamW, cosine schedule with 10 % warm-up, no weight decay."""
    return transformers.TrainingArguments(
        output_dir=folder,
        num_train_epochs=spec.epochs,
        per_device_train_batch_size=spec.batch_size,
        per_device_eval_batch_size=spec.batch_size,
        learning_rate=entry.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


@torch.no_grad()
def merge_error(model: nn.Module, adapter: Any, batch: dict[str, Tensor]) -> float:
    """Return max|y_merged − y_adapted| / max|y_adapted| on one batch, in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}

    def outputs() -> Tensor:
        y = model(**inputs)
        return (y if isinstance(y, Tensor) else y.logits).float()

    adapted = outputs()
    adapter.merge()
    error = (outputs() - adapted).abs().max() / adapted.abs().max()
    adapter.unmerge()
    return float(error)


class _Advance(transformers.TrainerCallback):
    """Move a progress bar with the trainer's steps."""

    def __init__(self, progress: Progress, bar: TaskID) -> None:
        self.progress, self.bar = progress, bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.bar, total=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.advance(self.bar)
