"""``svdpeft train``: one training of one method, from the names of a model and of data to a folder with the adapter."""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils._pytree import tree_leaves

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.file import HEADER, TENSORS
from svdpeft.atomic import replacing
from svdpeft.decomposition import processes, svd_cache, svd_cache_until_attached
from svdpeft.finetuning.order import Order
from svdpeft.finetuning.record import RECORD
from svdpeft.finetuning.session import Session
from svdpeft.finetuning.tracing import Untraceable, shapes_only, trace_step
from svdpeft.interop.card import CARD, card
from svdpeft.training.checkpoints import last_checkpoint
from svdpeft.training.recipe import Recipe
from svdpeft.training.trackers import check_tracker
from svdpeft.training.trainer import Trainer

LOCK = ".training.lock"  # of the process that trains into a folder
SEEN, PATIENCE = 64, 20.0  # examples, and seconds, for the estimate of the memory


@dataclass
class Training:
    """One training, made ready: the plan can be told before a step is taken.

    Args:
        order: what is asked for.
        session: the model with its data.
        adapter: attached to it.
        attach_seconds: that took.
    """

    order: Order
    session: Session
    adapter: Adapter
    attach_seconds: float

    @classmethod
    def of(cls, order: Order, resume: bool = False) -> Training:
        """Load, read and attach; nothing is written that stays.

        Args:
            order: what is asked for.
            resume: whether it goes on where an earlier training in the same folder stopped.

        Raises:
            ValueError: the folder holds a training already, or, to resume, none or one of other settings.
        """
        _check_folder(order, resume)
        check_tracker(order.tracker)
        splits = ("train", "validation") if order.eval_every else ("train",)
        session = Session(order.setup, splits)  # type: ignore[arg-type]
        if order.svd_cache is not None:
            shared: Any = svd_cache(order.svd_cache)
        elif processes()[1] > 1:
            shared = svd_cache_until_attached(order.out / "decompositions")
        else:
            shared = nullcontext()
        with shared:
            adapter, seconds = session.attach(session.model, order.method, order.recipe.batch_size)
        return cls(order, session, adapter, seconds)

    def plan(self) -> list[tuple[str, str]]:
        """What will happen, as (what, how much) lines."""
        order, session, adapter = self.order, self.session, self.adapter
        recipe, data, devices = order.recipe, session.data.train, processes()[1]
        count, share = adapter.trainable_count, adapter.trainable_count / session.base
        forwards, steps = recipe.batches(len(data), devices)  # type: ignore[arg-type]
        passes = steps * recipe.accumulate / max(forwards, 1)
        stored = "" if order.setup.quantize is None else f", its linear layers in {order.setup.quantize}"
        told = str(data) if type(data).__str__ is not object.__str__ else f"{len(data):,} examples"  # type: ignore[arg-type]
        return [
            ("model", f"{session.loaded.name}, {session.base:,} values in {order.setup.dtype}{stored}"),
            ("method", f"{order.method} on {len(adapter.sites)} sites, attached in {self.attach_seconds:.1f} s"),
            ("trains", f"{count:,} values, {share:.3%} of the base"),
            ("data", told),
            (
                "steps",
                f"{steps:,} of {recipe.batch_size * recipe.accumulate * devices} examples, "
                f"{passes:.3g} × the data; {recipe.scheduler} from {recipe.lr:g}{_around(recipe)}",
            ),
            ("memory", self._memory()),
            ("out", str(order.out)),
        ]

    def _memory(self) -> str:
        """What a step holds at its peak, for the longest of some examples."""
        recipe, data, collate = self.order.recipe, self.session.data.train, self.session.data.collate
        with torch.random.fork_rng(devices=[]):
            some: list[Any] = [data[i] for i in range(min(len(data), max(recipe.batch_size, SEEN)))]  # type: ignore[arg-type]
        some.sort(key=lambda example: -sum(leaf.numel() for leaf in tree_leaves(example) if isinstance(leaf, Tensor)))
        batch = collate(some[: recipe.batch_size])
        try:
            with shapes_only() as mode:
                return str(
                    trace_step(mode, self.adapter, batch, recipe.accumulate, recipe.mixed_precision, seconds=PATIENCE)
                )
        except Untraceable as error:
            return f"not known: {error}"

    def run(self, resume: bool = False, progress: bool = True, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
        """Train, and write the adapter and its record; return the record.

        Args:
            resume: from the last checkpoint.
            progress: whether the trainer shows a bar.
            callbacks: of the trainer.

        Raises:
            ValueError: another process trains into the folder, or has done so since.
            Diverged: a gradient is not finite; the last checkpoint is as it was.
        """
        order, out = self.order, self.order.out
        every = {
            "save_strategy": "steps" if order.save_every else "no",
            "save_steps": order.save_every or 500,
            "save_total_limit": order.keep,
            "eval_strategy": "steps" if order.eval_every else "no",
            "eval_steps": order.eval_every or None,
        }
        trainer = self.session.trainer(
            self.adapter,
            order.recipe,
            out,
            callbacks,
            validates=bool(order.eval_every),
            logging_steps=1,
            report_to=order.tracker,
            disable_tqdm=not progress,
            **every,
        )
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
        if progress:
            trainer.add_callback(_Progress)
        with _alone(order, resume) if trainer.is_world_process_zero() else nullcontext():
            return self._run(trainer, resume)

    def _run(self, trainer: Trainer, resume: bool) -> dict[str, Any]:
        order, out = self.order, self.order.out
        record: dict[str, Any] = {"command": shlex.join(order.command), "settings": order.settings()}
        if trainer.is_world_process_zero():
            _write(out / RECORD, record)
        last = last_checkpoint(out, self.adapter) if resume else None
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        record |= {
            "steps": trainer.state.global_step,
            "trainable": self.adapter.trainable_count,
            "sites": len(self.adapter.sites),
            "attach_seconds": self.attach_seconds,
            "log": (logs := trainer.state.log_history),
        }
        if trainer.shards or trainer.is_world_process_zero():
            self.adapter.save(out)
        if trainer.is_world_process_zero():
            _write(out / RECORD, record)
            told = {name: rows[-1][name] for name in ("loss", "eval_loss") if (rows := [r for r in logs if name in r])}
            with replacing(out / CARD) as new:
                new.write_text(
                    card(self.adapter, order.setup.model, str(out), told, record["command"], self._options())
                )
        return record

    def _options(self) -> dict[str, Any]:
        """What the base was loaded with, beside its name."""
        setup = self.order.setup
        options = {
            "num_classes": setup.task.num_classes,
            "image_size": setup.image_size,
            "quantize": setup.quantize,
        }
        dtype = {} if setup.dtype == "float32" else {"dtype": getattr(torch, setup.dtype)}
        return {name: value for name, value in options.items() if value is not None} | dtype


@contextmanager
def _alone(order: Order, resume: bool) -> Iterator[None]:
    """Within the block no other process trains into the folder, and none has begun since it was looked at."""
    order.out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(order.out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"another process trains into {order.out}: wait for its end, or choose another folder"
        ) from error
    try:
        _check_folder(order, resume)
        yield
    finally:
        with suppress(OSError):  # on Windows an open file stays
            (order.out / LOCK).unlink()
        lock.release()


def _check_folder(order: Order, resume: bool) -> None:
    """A folder with a training in it is gone on with, by its own settings, or left alone."""
    out, record = order.out, order.out / RECORD
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: the training needs a folder")
    if not resume:
        if any((out / name).exists() for name in (RECORD, HEADER, TENSORS)):
            raise ValueError(f"{out} holds a training already: resume goes on with it, or choose another folder")
        if (out / CARD).exists():
            raise ValueError(f"{out} has a {CARD}, where the adapter's is to be: choose another folder")
        return
    if not record.exists():
        raise ValueError(f"{out} holds no training to resume: it has no {RECORD}")
    before, now = json.loads(record.read_text())["settings"], order.settings()
    if changed := _changed(before, now):
        raise ValueError(f"{out} was begun with other settings: {'; '.join(changed)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the training goes on
        last = last_checkpoint(out)
    if last is None:
        raise ValueError(f"{out} has no checkpoint to resume from: nothing was saved, save_every says when")


def _around(recipe: Recipe) -> str:
    """What is said of the steps beside the rate."""
    ratio = "" if recipe.loraplus_ratio is None else f", of L {recipe.loraplus_ratio:g} times that"
    return ratio + ("" if recipe.gradients is None else f"; gradients {recipe.gradients}")


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> list[str]:
    found = []
    for name in {**before, **now}:
        a, b = before.get(name), now.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += _changed(a, b, f"{above}{name}.")
        elif a != b:
            found.append(f"{above}{name} was {a!r} and is {b!r}")
    return found


def _write(path: Path, record: Mapping[str, Any]) -> None:
    with replacing(path) as new:
        new.write_text(json.dumps(record, indent=1, default=str) + "\n")


class _Progress(transformers.trainer_callback.ProgressCallback):
    """transformers' bar with the loss behind it; a line every tenth of the way where nobody watches a terminal."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watched = sys.stderr.isatty()
        if self._watched:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._watched:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """No bar within the bar."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        told = {name: f"{logs[name]:.4g}" for name in ("loss", "eval_loss", "learning_rate") if name in logs}
        if self._watched and self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(told)
        every = max(state.max_steps // 10, 1)
        if not self._watched and told and (state.global_step % every == 0 or state.global_step in (1, state.max_steps)):
            words = ", ".join(f"{name} {value}" for name, value in told.items())
            print(f"step {state.global_step}/{state.max_steps}: {words}", file=sys.stderr, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._watched:
            super().on_train_end(args, state, control, **kwargs)
