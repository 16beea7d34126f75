"""A model with its data, its adapter and its trainer, made ready as a setup says."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.attach import attach
from svdpeft.calibration.calibrate import calibrate
from svdpeft.calibration.calibration import Calibration
from svdpeft.finetuning.words import check_preserve
from svdpeft.layers.quantising import scheme_named, values_in
from svdpeft.methods.base import Method, PerSite
from svdpeft.models import Loaded, load
from svdpeft.registry import TASKS, near_miss
from svdpeft.targets.rules import default_targets
from svdpeft.tasks.base import SPLITS, SplitName, Task, TaskData, whole
from svdpeft.training.recipe import DTYPES, Recipe
from svdpeft.training.trainer import Trainer, returns_loss

CALIBRATION_BATCHES = 8  # of training data that methods which start from data see
PRESERVED_LENGTH = 512  # tokens of a text whose outputs are to stay


@dataclass(frozen=True)
class Setup:
    """What is trained, and on what.

    Args:
        model: a name that ``svdpeft.models.load`` takes.
        task: of its modality.
        targets: patterns of the layers that factored methods adapt; ``None`` is what ``attach`` adapts then.
        exclude: patterns of layers that are left alone.
        whole: patterns of what is trained whole beside a new head.
        image_size: side of a vision model's input in pixels; ``None`` is the model's own.
        dtype: of the base.
        seed: of initialisation, batch order and dropout.
        head_lr: learning rate of a new head, where the method has factors; ``None`` is the method's.
        quantize: a scheme of ``svdpeft.quantize`` by which the base is stored.
        preserve: text or pictures of one's own whose outputs are to stay, for a method that starts from such data, too.

    Raises:
        ValueError: a seed, a dtype, a rate or a scheme that does not exist.
        ImportError: the scheme's library is not installed.
    """

    model: str
    task: Task
    targets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    image_size: int | None = None
    dtype: str = "float32"
    seed: int = 0
    head_lr: float | None = None
    quantize: str | None = None
    preserve: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r}: {near_miss(str(self.dtype), DTYPES)}")
        if not whole(self.seed) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed!r} is no whole number in [0, 2^32)")
        if self.head_lr is not None and not (
            isinstance(self.head_lr, int | float) and 0 < self.head_lr <= sys.float_info.max
        ):
            raise ValueError(f"head_lr {self.head_lr!r} is not a finite number above 0")
        if self.quantize is not None:
            scheme_named(self.quantize)


class Session:
    """A model and its data, ready to be adapted and trained.

    Args:
        setup: what it is made of.
        splits: of the data that are prepared.
    """

    def __init__(self, setup: Setup, splits: Collection[SplitName] = SPLITS) -> None:
        self.setup = setup
        transformers.set_seed(setup.seed)
        self.loaded: Loaded = self.load()
        self.model: nn.Module = self.loaded.model
        self.targets = setup.targets or (default_targets(self.model),)
        new = setup.task.num_classes is not None and self.loaded.head is not None
        self.head: tuple[str, ...] = (*self.loaded.fresh, str(self.loaded.head)) if new else ()
        self.base = values_in(self.model)
        some = {} if splits is SPLITS else {"splits": splits}  # a task of the user's may know no other
        self.data: TaskData = setup.task.prepare(self.loaded, setup.seed, **some)

    def load(self) -> Loaded:
        """Load the base, with a new head of this seed where the task wants one."""
        setup = self.setup
        stored: dict[str, Any] = {} if setup.quantize is None else {"quantize": setup.quantize}
        loaded = load(
            setup.model,
            num_classes=setup.task.num_classes,
            image_size=setup.image_size,
            dtype=getattr(torch, setup.dtype),
            seed=setup.seed,
            **stored,
        )
        if torch.cuda.is_available():
            mine = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()  # of several processes each its own
            loaded.model.to(f"cuda:{mine}")
        elif loaded.modality == "vision":  # a CPU's convolutions take half the time so; timm's models all allow it
            loaded.model.to(memory_format=torch.channels_last)
        return loaded

    def attach(self, model: nn.Module, method: Method, batch_size: int) -> tuple[Adapter, float]:
        """Attach a method, and return how many seconds that took, with the batches that it starts from.

        Args:
            model: this session's, or another one that ``load`` gave.
            method: to attach.
            batch_size: examples of the batches that a method which starts from data sees.
        """
        setup, started = self.setup, time.perf_counter()
        seen = None
        if isinstance(method, PerSite) and method.needs:
            seen = seen_by(model, method, batches(model, self.data, batch_size), self.targets, setup.exclude)
            if method.preserves:
                check_preserve(setup.preserve, [method])
                kept = batches(model, self.preserved(), batch_size)
                seen = seen.preserving(calibrate(model, kept, self.targets, setup.exclude, call=without_labels))
        whole = (*self.head, *setup.whole)
        adapter = attach(
            model, method, self.targets, setup.exclude, whole, seed=setup.seed, clip_rank=True, calibration=seen
        )
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return adapter, time.perf_counter() - started

    def preserved(self) -> TaskData:
        """The data whose outputs are to stay.

        Raises:
            ValueError: they are not for this model.
        """
        data, vision = self.setup.preserve, self.loaded.modality == "vision"
        options: dict[str, Any] = {"shots": "all"} if vision else {"max_length": PRESERVED_LENGTH}
        task = TASKS.make("images" if vision else "text", {"data": data, **options})
        return task.prepare(self.loaded, self.setup.seed, splits=("train",))

    def trainer(
        self,
        adapter: Adapter,
        recipe: Recipe,
        folder: Path,
        callbacks: Sequence[Any] = (),
        validates: bool = False,
        **more: Any,
    ) -> Trainer:
        """Return the trainer of an attached adapter.

        Args:
            adapter: attached to this session's model.
            recipe: how it trains.
            folder: where checkpoints and logs go.
            callbacks: of the trainer.
            validates: whether it measures the loss of the validation split, too.
            **more: arguments of ``transformers.TrainingArguments``.
        """
        setup = self.setup
        if recipe.checkpoint_activations:
            recompute(self.model)
        # Methods without factors train parameters of the base in the same role as the head, or the head alone.
        own = bool(self.head) and setup.head_lr is not None and any(True for _ in adapter.sites)
        return Trainer(
            model=self.model,
            adapter=adapter,
            args=recipe.arguments(folder, seed=setup.seed, **more),
            role_lr={"whole": setup.head_lr} if own and setup.head_lr is not None else None,
            loraplus_ratio=recipe.loraplus_ratio,
            gradients=recipe.gradients,
            train_dataset=self.data.train,
            eval_dataset=self.data.validation if validates else None,
            data_collator=self.data.collate,
            callbacks=list(callbacks),
        )


def recompute(model: Any) -> None:
    """Let a model compute its activations again in the backward pass instead of keeping them.

    Raises:
        ValueError: a model that has no such switch.
    """
    switches = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # transformers', new and old
    if switch := next((found for name in switches if callable(found := getattr(model, name, None))), None):
        switch({"use_reentrant": False})
    elif callable(getattr(model, "set_grad_checkpointing", None)):  # timm
        model.set_grad_checkpointing(True)
    else:
        raise ValueError(f"a {type(model).__name__} has no switch to checkpoint its activations")


def batches(model: nn.Module, data: TaskData, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """A few batches of training data, for a method that starts from data.

    Args:
        model: on whose device they are.
        data: of a task.
        batch_size: examples per batch.
    """
    device = next(model.parameters()).device
    total = len(data.train)  # type: ignore[arg-type]
    size = min(batch_size, total)
    for i in range(min(CALIBRATION_BATCHES, total // size)):
        batch = data.collate([data.train[j] for j in range(i * size, (i + 1) * size)])
        yield {name: value.to(device) for name, value in batch.items()}


def seen_by(
    model: nn.Module, method: PerSite, batches: Iterable[Any], targets: Any, exclude: Sequence[str], **more: Any
) -> Calibration:
    """What ``calibrate`` sees for a method: the inputs of the layers, or the gradients of the loss.

    Args:
        model: the base.
        method: which needs one of the two.
        batches: of training data.
        targets: what is adapted.
        exclude: what is not.
        **more: arguments of ``calibrate``.
    """
    gradients = method.needs == "gradients"
    return calibrate(
        model, batches, targets, exclude, inputs=not gradients, gradients=gradients, loss=loss, call=call, **more
    )


def call(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """What a model gives for a batch: with labels, where it has a loss of its own."""
    own = returns_loss(model)
    return model(**{name: value for name, value in batch.items() if own or name != "labels"})


def without_labels(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """What a model gives for the rest of a batch: the classes of other data are not its own."""
    return model(**{name: value for name, value in batch.items() if name != "labels"})


def loss(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of what ``call`` gave: the model's own, or cross-entropy."""
    return cross_entropy(output, batch["labels"]) if isinstance(output, Tensor) else output.loss
