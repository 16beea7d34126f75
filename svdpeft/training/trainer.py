"""``transformers.Trainer`` for adapters: distribution, precision, accumulation, resume and logging are its."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.file import FOLDER
from svdpeft.adapter.loading import restore
from svdpeft.registry import near_miss
from svdpeft.training.callback import StepCallback
from svdpeft.training.memory import peak_memory
from svdpeft.training.resume import load_training_state, save_training_state


def returns_loss(model: nn.Module) -> bool:
    """Whether a model takes labels and gives a loss of its own, as those of transformers do and timm's do not."""
    return "labels" in inspect.signature(model.forward).parameters


ASKED = ("_save", "_load_from_checkpoint", "_load_best_model")


class Trainer(transformers.Trainer):
    """Train what the adapter trains, and save that only.

    Models that return a bare tensor (timm) get a cross-entropy loss against ``labels``; models that return a loss
    keep theirs. The method's penalty, gradient and after-step rules happen where its mode puts them. Checkpoints hold
    the adapter, what its method remembers of the training, the optimizer and the random state; a resumed run continues
    to the same weights.

    Args:
        model: with the adapter attached.
        adapter: what trains.
        args: ``transformers.TrainingArguments``.
        role_lr: learning rate by role of factor (``"L"``, ``"C"``, ``"A"``, ``"whole"``), where it differs from
            ``args.learning_rate``.
        **kwargs: everything else that ``transformers.Trainer`` takes.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        args: transformers.TrainingArguments,
        role_lr: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        for role in role_lr or {}:
            if role not in adapter.roles():
                raise ValueError(f"role_lr names the role {role!r}: {near_miss(role, adapter.roles())}")
        for split in ("train_dataset", "eval_dataset"):
            data = kwargs.get(split)
            if data is not None and hasattr(data, "__len__") and len(data) == 0:
                raise ValueError(f"{split} is empty: there is nothing to train on or to evaluate")
        if gone := [name for name in ASKED if not hasattr(transformers.Trainer, name)]:
            # They are private: a release that asks others would write whole models, and nothing would say so.
            raise RuntimeError(f"transformers {transformers.__version__} has no Trainer.{gone[0]}: take an older one")
        super().__init__(model=model, args=args, **kwargs)
        self.adapter = adapter
        self.role_lr = dict(role_lr or {})
        self.add_callback(StepCallback(adapter))
        self._returns_loss = returns_loss(model)
        if not self._returns_loss:
            self.label_names = ["labels"]
            if self.compute_loss_func is None:
                self.loss_is_scaled_for_ga = False  # ours is a mean over the batch
        self._logged_at = (time.perf_counter(), 0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss, plus the method's penalty while training."""
        own = self._returns_loss or self.compute_loss_func is not None
        if own:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            inputs = dict(inputs)
            labels = inputs.pop("labels")
            logits = model(**inputs)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.args.label_smoothing_factor)
            outputs = {"logits": logits}
        if model.training and (penalty := self.adapter.penalty()) is not None:
            # A loss that is normalised over the whole accumulated batch is not divided by its steps later on.
            scaled = (
                own
                and num_items_in_batch is not None
                and (self.model_accepts_loss_kwargs or self.compute_loss_func is not None)
            )
            loss = loss + penalty / (self.current_gradient_accumulation_steps if scaled else 1)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The stock optimizer, its groups split by role where a role has a learning rate of its own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh and self.role_lr:
            role_of = {id(p): role for role, parameters in self.adapter.roles().items() for p in parameters}
            groups = []
            for group in optimizer.param_groups:
                for role in dict.fromkeys(role_of[id(p)] for p in group["params"]):
                    members = [p for p in group["params"] if role_of[id(p)] == role]
                    groups.append({**group, "params": members, "lr": self.role_lr.get(role, group["lr"])})
            optimizer.param_groups[:] = groups
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add trainable count, seconds per step and peak memory to what a training step logs."""
        if "loss" in logs:
            now, step = time.perf_counter(), self.state.global_step
            before, last = self._logged_at
            # Over the interval since the last entry: timing single steps would synchronise the device.
            logs["step_time"] = (now - before) / max(step - last, 1)
            logs["peak_memory_mib"] = peak_memory() / 2**20
            logs["trainable"] = self.adapter.trainable_count
            self._logged_at = (now, step)
        super().log(logs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """``transformers.Trainer``'s; the time of the first steps counts from here."""
        self._logged_at = (time.perf_counter(), self.state.global_step)
        return super().train(*args, **kwargs)

    # Adapter-only checkpoints: transformers asks these three (``ASKED``) where a whole model would be written or read.

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self.adapter.save(folder / FOLDER)
            save_training_state(self.adapter, folder)
            torch.save(self.args, folder / "training_args.bin")
            if self.processing_class is not None:
                self.processing_class.save_pretrained(os.fspath(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._restore(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._restore(Path(self.state.best_model_checkpoint))

    def _restore(self, folder: Path) -> None:
        restore(self.adapter, folder / FOLDER)
        load_training_state(self.adapter, folder)
