"""How a training goes, whatever is trained on what: what the arguments of transformers' trainer are made of."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdpeft.adapter.gradients import rule_for
from svdpeft.adapter.loraplus import check_ratio
from svdpeft.registry import near_miss

PRECISIONS = ("bf16", "fp16", "tf32")
DTYPES = ("float32", "bfloat16", "float16")  # of a base


@dataclass(frozen=True)
class Recipe:
    """Learning rate, steps and schedule of one training; AdamW.

    Args:
        lr: peak learning rate.
        batch_size: examples per forward on one device.
        epochs: passes over the training data.
        steps: optimizer steps in the place of ``epochs``.
        accumulate: forwards per optimizer step.
        scheduler: of the learning rate, one of transformers' (``"cosine"``, ``"linear"``, ``"constant"``, …).
        warmup: in which the rate rises from 0: a share of the steps below 1, else a number of steps.
        weight_decay: of AdamW, decoupled.
        clip: the norm that gradients are clipped to; 0 leaves them.
        mixed_precision: ``"bf16"`` or ``"fp16"`` autocast, ``"tf32"`` products; ``None``: the dtypes of the tensors.
        checkpoint_activations: compute them again in the backward pass instead of keeping them; whoever has the model
            switches it on there.
        loraplus_ratio: LoRA+, the rate of L as a multiple of that of A; ``None``: one rate for both.
        gradients: a rule for the gradients of L and A, ``"riemannian"`` or ``"lora-pro"``; ``None``: as they are.

    Raises:
        ValueError: a number out of range, a scheduler, a precision or a rule that does not exist.

    Example:
        >>> Recipe(lr=3e-5, batch_size=2, accumulate=64, warmup=0.03).batches(100_000)
        (50000, 782)
    """

    lr: float
    batch_size: int = 8
    epochs: float = 1.0
    steps: int | None = None
    accumulate: int = 1
    scheduler: str = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    mixed_precision: str | None = None
    checkpoint_activations: bool = False
    loraplus_ratio: float | None = None
    gradients: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "steps"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} {value!r} is not a whole number of at least 1")
        for name, least in (("lr", 0), ("epochs", 0), ("warmup", 0), ("weight_decay", 0), ("clip", 0)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and value <= sys.float_info.max
            if not number or value < least or (value == 0 and name in ("lr", "epochs")):
                more = "above 0" if name in ("lr", "epochs") else "of at least 0"
                raise ValueError(f"{name} {value!r} is not a finite number {more}")
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup {self.warmup} is neither a share of the steps below 1 nor a number of them")
        if self.mixed_precision not in (None, *PRECISIONS):
            raise ValueError(
                f"mixed_precision {self.mixed_precision!r}: {near_miss(str(self.mixed_precision), PRECISIONS)}"
            )
        if self.loraplus_ratio is not None:
            check_ratio(self.loraplus_ratio)
        if self.gradients is not None:
            rule_for(self.gradients, ())
        from transformers import SchedulerType

        if self.scheduler not in (known := [kind.value for kind in SchedulerType]):
            raise ValueError(f"scheduler {self.scheduler!r}: {near_miss(self.scheduler, known)}")

    def batches(self, examples: int, devices: int = 1) -> tuple[int, int]:
        """Forwards in a pass over so many examples, and optimizer steps of the whole training."""
        forwards = math.ceil(examples / (self.batch_size * devices))
        each = math.ceil(forwards / self.accumulate)
        return forwards, self.steps if self.steps is not None else math.ceil(each * self.epochs)

    def arguments(self, folder: str | Path, **more: Any) -> Any:
        """Return ``transformers.TrainingArguments`` of this recipe.

        Args:
            folder: where checkpoints and logs go.
            **more: everything else that they take.
        """
        import torch
        from transformers import TrainingArguments

        gpu = torch.cuda.is_available()
        return TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=self.epochs,
            max_steps=-1 if self.steps is None else self.steps,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulate,
            learning_rate=self.lr,
            lr_scheduler_type=self.scheduler,
            warmup_steps=self.warmup,
            weight_decay=self.weight_decay,
            max_grad_norm=self.clip,
            bf16=self.mixed_precision == "bf16",
            fp16=self.mixed_precision == "fp16",
            tf32=True if self.mixed_precision == "tf32" else None,
            remove_unused_columns=False,
            use_cpu=not gpu,
            dataloader_pin_memory=gpu,
            **more,
        )
