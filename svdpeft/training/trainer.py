"""``transformers.Trainer`` for adapters: distribution, precision, accumulation, resume and logging are its."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import can_return_loss, find_labels

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.gradients import Rule
from svdpeft.adapter.loraplus import check_roles, rates
from svdpeft.registry import near_miss
from svdpeft.sites.shards import reshard
from svdpeft.targets.wrappers import unwrapped
from svdpeft.training.callback import StepCallback, release
from svdpeft.training.checkpoints import check_checkpoint, last_checkpoint
from svdpeft.training.distribution import prepare
from svdpeft.training.divergence import check_gradients
from svdpeft.training.memory import peak_memory
from svdpeft.training.resume import load_checkpoint, save_checkpoint
from svdpeft.training.trained import alone, check_trains


def returns_loss(model: nn.Module, label_names: Sequence[str] | None = None) -> bool:
    """Whether a model takes labels and gives a loss of its own, as those of transformers do and timm's do not.

    Args:
        model: wrappers of it are seen through.
        label_names: what the labels are called, where the user says it.
    """
    inner = unwrapped(model)
    known = inspect.signature(inner.forward).parameters
    labels = find_labels(type(inner)) if label_names is None else [name for name in label_names if name in known]
    return bool(labels) or "return_loss" in known


def named(output: Any) -> Any:
    """A bare tensor as the one field of a dictionary: of anything else the trainer takes the first as the loss."""
    return {"logits": output} if isinstance(output, Tensor) else output


@dataclass(frozen=True)
class Pairs:
    """Collate (input, label) pairs, as torchvision's data sets give them, for a model of one input.

    Args:
        name: of the model's input.
    """

    name: str

    def __call__(self, examples: Sequence[tuple[Any, Any]]) -> dict[str, Tensor]:
        inputs, labels = zip(*examples, strict=True)
        return {self.name: torch.stack([torch.as_tensor(x) for x in inputs]), "labels": torch.as_tensor(labels)}

    @classmethod
    def of(cls, model: nn.Module, data: Any) -> Pairs | None:
        """The collator for this data, where they are such pairs."""
        pair = data[0] if hasattr(data, "__getitem__") and hasattr(data, "__len__") and len(data) else None
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            return None
        return cls(next(iter(inspect.signature(unwrapped(model).forward).parameters)))


ASKED = ("_save", "_save_optimizer_and_scheduler", "_load_from_checkpoint", "_load_best_model")


class Trainer(transformers.Trainer):
    """Train what the adapter trains, and save that only.

    Models that return a bare tensor (timm) get a cross-entropy loss against ``labels``, also of data sets of pairs
    (torchvision); models that return a loss keep theirs. The method's penalty, gradient and after-step rules happen
    where its mode puts them. Checkpoints hold the adapter, what its method remembers of the training, the optimizer and
    the random state; a resumed run continues to the same weights.

    Args:
        model: with the adapter attached.
        adapter: what trains.
        args: ``transformers.TrainingArguments``.
        role_lr: learning rate by role of factor (``"L"``, ``"C"``, ``"A"``, ``"whole"``), where it differs from
            ``args.learning_rate``.
        loraplus_ratio: LoRA+, the rate of L as a multiple of that of A.
        gradients: a rule for the gradients of L and A, after clipping and before the optimizer's step:
            ``"riemannian"``, ``"lora-pro"``, or a function (``svdpeft.adapter.gradients``).
        **kwargs: everything else that ``transformers.Trainer`` takes.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        args: transformers.TrainingArguments,
        role_lr: Mapping[str, float] | None = None,
        loraplus_ratio: float | None = None,
        gradients: str | Rule | None = None,
        **kwargs: Any,
    ) -> None:
        for role in role_lr or {}:
            if role not in adapter.roles():
                raise ValueError(f"role_lr names the role {role!r}: {near_miss(role, adapter.roles())}")
        self.role_lr = dict(role_lr or {})
        if loraplus_ratio is not None:
            check_roles(loraplus_ratio, adapter.methods)
            self.role_lr = rates(loraplus_ratio, self.role_lr, args.learning_rate)
        if self.role_lr and (kwargs.get("optimizers") or (None,))[0] is not None:
            raise ValueError(
                f"rates by role, of {', '.join(self.role_lr)}, are for the optimizer that the trainer makes, and here "
                "is another: give that one groups of adapter.roles()"
            )
        for split in ("train_dataset", "eval_dataset"):
            data = kwargs.get(split)
            if data is not None and hasattr(data, "__len__") and len(data) == 0:
                raise ValueError(f"{split} is empty: there is nothing to train on or to evaluate")
        if gone := [name for name in ASKED if not hasattr(transformers.Trainer, name)]:
            # They are private: a release that asks others would write whole models, and nothing would say so.
            raise RuntimeError(f"transformers {transformers.__version__} has no Trainer.{gone[0]}: take an older one")
        if kwargs.get("data_collator") is None:
            data = (kwargs.get(split) for split in ("train_dataset", "eval_dataset"))
            kwargs["data_collator"] = next((found for d in data if (found := Pairs.of(model, d))), None)
        super().__init__(model=model, args=args, **kwargs)
        self.adapter = adapter
        self.gradients = gradients
        self.add_callback(StepCallback(adapter, gradients))
        self._returns_loss = returns_loss(model, args.label_names)
        if (inner := unwrapped(model)) is not model:  # transformers takes the signature of a wrapper for the model's
            self.label_names = args.label_names or find_labels(type(inner))
            self.can_return_loss = can_return_loss(type(inner))
            every = inspect.signature(inner.forward).parameters.values()
            takes = any(parameter.kind is parameter.VAR_KEYWORD for parameter in every)
            self.model_accepts_loss_kwargs = getattr(inner, "accepts_loss_kwargs", takes)
        if not self._returns_loss:
            self.label_names = self.label_names or ["labels"]
            if self.compute_loss_func is None:
                self.model_accepts_loss_kwargs = False  # ours is a mean over the batch: to be divided by the batches
        self._logged_at = (time.perf_counter(), 0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss, plus the method's penalty while training."""
        if self._returns_loss or self.compute_loss_func is not None:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            outputs = named(outputs)
        else:
            loss, outputs = self._cross_entropy(model, dict(inputs))
        if model.training and (penalty := self.adapter.penalty()) is not None:
            scaled = self._scales(num_items_in_batch)
            loss = loss + penalty / (self.current_gradient_accumulation_steps if scaled else 1)
        return (loss, outputs) if return_outputs else loss

    def _cross_entropy(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a model that has none of its own."""
        (name, *others) = self.label_names
        if name not in inputs:
            raise ValueError(
                f"the batch has no {name!r}, but {', '.join(map(repr, inputs))}: name what holds the labels in "
                "TrainingArguments(label_names=[…]), or give a compute_loss_func"
            )
        labels = inputs.pop(name)
        logits = None if others else model(**inputs)
        if not isinstance(logits, Tensor):
            what = f"{len(self.label_names)} labels" if others else f"a {type(logits).__name__} and no loss"
            raise ValueError(
                f"cross-entropy is of one tensor of logits and one of labels, and here are {what}: give the trainer a "
                "compute_loss_func"
            )
        return F.cross_entropy(logits, labels, label_smoothing=self.args.label_smoothing_factor), {"logits": logits}

    def _scales(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the loss is normalised over the whole accumulated batch, and not divided by its steps later on."""
        if (said := getattr(self, "loss_is_scaled_for_ga", None)) is not None:  # by a class derived from this one
            return bool(said)
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """``transformers.Trainer``'s, which would take the first row of a bare tensor for the loss."""
        if not self._returns_loss and any(inputs.get(name) is None for name in self.label_names):
            bare = model
            return super().prediction_step(lambda **inputs: named(bare(**inputs)), inputs, *args, **kwargs)  # type: ignore[arg-type]
        return super().prediction_step(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """``transformers.Trainer``'s, and a look at the gradients before they are clipped and the optimizer takes them.

        Raises:
            Diverged: a gradient is not finite.
        """
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self.accelerator.scaler is None:
            check_gradients(self.adapter, self.state.global_step + 1)
        return loss

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

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """``transformers.Trainer``'s: exactly what the adapter trains, while other adapters of the model rest.

        Args:
            resume_from_checkpoint: a checkpoint, or ``True`` for the last whole one in ``output_dir``; a warning names
                later ones that a kill or a full disk has left, and what they lack.
            args: as for ``transformers.Trainer``.
            kwargs: as for ``transformers.Trainer``.

        Raises:
            RuntimeError: the adapter is merged, disabled or detached.
            ValueError: the adapter is of another model; the model or the optimizer has something else to train; a
                sharding that the method cannot be trained with; a checkpoint that is not whole.
            Diverged: a gradient is not finite; the adapter holds what the last good step left.
        """
        model: Any = self.model
        optimizer: Any = self.optimizer
        # A step callback of its own says of another adapter that it trains beside this one.
        training = [each.adapter for each in self.callback_handler.callbacks if isinstance(each, StepCallback)]
        release(self.adapter)
        reshard(model.modules())
        check_trains(self.adapter, model, optimizer)
        prepare(self.accelerator, self.adapter, self.gradients is not None)
        self._logged_at = (time.perf_counter(), self.state.global_step)
        if resume_from_checkpoint is True:
            last = last_checkpoint(self.args.output_dir or ".", self.adapter)
            resume_from_checkpoint = True if last is None else os.fspath(last)  # which says that there is none
        elif resume_from_checkpoint:
            check_checkpoint(Path(resume_from_checkpoint), self.adapter, self.args.save_only_model)
        with alone(training, model):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def shards(self) -> bool:
        """Whether the model is sharded over processes, which gather together what is saved."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    # Adapter-only checkpoints: transformers asks these (``ASKED``) where a whole model would be written or read.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """``transformers.Trainer``'s, which would gather the whole model where it is sharded."""
        if self.shards:
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        if self.args.should_save or self.shards:
            folder.mkdir(parents=True, exist_ok=True)
            save_checkpoint(self.adapter, folder)
        if self.args.should_save:
            torch.save(self.args, folder / "training_args.bin")
            if self.processing_class is not None:
                self.processing_class.save_pretrained(os.fspath(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_checkpoint(self.adapter, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        load_checkpoint(self.adapter, Path(self.state.best_model_checkpoint))
