"""What an adapter needs of a training loop, for any trainer that calls transformers' callbacks."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.file import FOLDER
from svdpeft.adapter.gradients import Rule, rule_for
from svdpeft.adapter.pretrained import NAME
from svdpeft.adapter.turns import turns
from svdpeft.atomic import replacing
from svdpeft.sites.place import is_factor
from svdpeft.sites.shards import sharded
from svdpeft.training.checkpoints import check_checkpoint
from svdpeft.training.divergence import check_gradients, check_skipped
from svdpeft.training.resume import keeps_state, load_checkpoint, load_training_state, save_checkpoint
from svdpeft.training.trained import check_trains

LEFT_OUT = "_keys_to_ignore_on_save"


class StepCallback(TrainerCallback):
    """Call ``before_step`` and ``after_step`` where the method's mathematics wants them.

    Args:
        adapter: attached to the model that is trained.
        gradients: a rule for the gradients of L and A, as in ``Trainer``.
    """

    def __init__(self, adapter: Adapter, gradients: str | Rule | None = None) -> None:
        if gradients is not None:
            rule_for(gradients, adapter.methods)
        self.adapter, self.gradients = adapter, gradients
        self.skipped = 0  # steps in a row that a scaler of float16 left out
        self.left_out = 0  # of this training, which are no steps of the adapter

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        turns(self.adapter.model).train(self.adapter.name)
        resumed = state.global_step and keeps_state(self.adapter)  # then it has been said how many steps were taken
        self.left_out = max(state.global_step - self.adapter.steps, 0) if resumed else 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.adapter.steps = state.global_step - self.left_out  # a resumed training goes on counting
        self.adapter.before_step(args.learning_rate, state.max_steps - self.left_out, self.gradients)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs["optimizer"]
        if getattr(optimizer, "step_was_skipped", False):  # fp16 overflow: the factors did not move either
            self.skipped, self.left_out = self.skipped + 1, self.left_out + 1
            check_skipped(self.skipped)
            return
        self.skipped = 0
        # A scheduler scales all groups alike and notes their peaks; a role may have a learning rate of zero.
        peak, lr = max((group.get("initial_lr", args.learning_rate), group["lr"]) for group in optimizer.param_groups)
        self.adapter.after_step(lr / peak if peak else 0.0, state.max_steps - self.left_out)


class AdapterCallback(StepCallback):
    """Train an adapter with a stock ``transformers.Trainer``, or a trainer built on one (TRL and the like).

    Does what ``svdpeft.Trainer`` does without replacing it: calls the method around each step, adds its penalty to the
    loss that the model returns, stops at a gradient that is not finite, and saves ``checkpoint-N/adapter``. A
    checkpoint holds the adapter alone, and the same tensors in a ``model.safetensors``, from which the trainer resumes.

    Args:
        adapter: attached to the model that is trained.
        gradients: a rule for the gradients of L and A, as in ``Trainer``.

    Example::

        trainer = trl.SFTTrainer(model=model, callbacks=[svdpeft.AdapterCallback(adapter)], ...)
    """

    accumulates = 1  # batches of the optimizer step that runs
    hooks: ClassVar[weakref.WeakKeyDictionary[Adapter, RemovableHandle]] = weakref.WeakKeyDictionary()

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not hasattr(self.adapter.model, LEFT_OUT):  # what the trainer asks any module when it loads a part of it
            setattr(self.adapter.model, LEFT_OUT, None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        release(self.adapter)  # of a training that was interrupted
        check_trains(self.adapter, kwargs.get("model", self.adapter.model), kwargs.get("optimizer"))
        shared = next((n for n, site in self.adapter.sites.items() if site.factors.tied or len(site.places) > 1), None)
        if shared is not None and args.save_strategy != "no" and not hasattr(self.adapter.model, NAME):
            raise ValueError(
                f"{shared} shares tensors between sites or layers, which a stock trainer cannot save with its model: "
                "use svdpeft.Trainer, or save_strategy='no' and adapter.save()"
            )
        if args.save_strategy != "no" and any(map(sharded, self.adapter.model.parameters())):
            raise ValueError(
                "a stock trainer gathers a sharded model whole at every checkpoint, and writes it: use "
                "svdpeft.Trainer, or save_strategy='no' and adapter.save() in all processes"
            )
        if state.global_step:  # resumed: the trainer has loaded the same values, and asked nothing about the base
            folder = self._folder(args, state)
            check_checkpoint(folder, self.adapter, args.save_only_model)
            # A run that was resumed from elsewhere has no such folder, and nothing but the values.
            (load_checkpoint if (folder / FOLDER).exists() else load_training_state)(self.adapter, folder)
        super().on_train_begin(args, state, control, **kwargs)
        if self.adapter.penalty() is not None:
            self.hooks[self.adapter] = self.adapter.model.register_forward_hook(self._add_penalty, with_kwargs=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.accumulates = micro_batches(args.gradient_accumulation_steps, kwargs.get("train_dataloader"), state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not args.fp16:  # else a scaler leaves such a step out
            check_gradients(self.adapter, state.global_step + 1)
        super().on_pre_optimizer_step(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        release(self.adapter)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            load_checkpoint(self.adapter, Path(state.best_model_checkpoint))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not args.should_save:
            return
        folder = self._folder(args, state)
        save_checkpoint(self.adapter, folder)
        # save_pretrained has written nothing that a trainer resumes from; of a bare module the trainer wrote the whole.
        with replacing(folder / SAFE_WEIGHTS_NAME) as new:
            save_file(trained_tensors(self.adapter), new, metadata={"format": "svdpeft"})

    def _folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

    def _add_penalty(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not model.training or (penalty := self.adapter.penalty()) is None:
            return
        if getattr(output, "loss", None) is None:
            raise RuntimeError(
                "the method adds a penalty to the loss, but the model returned none (a trainer with a loss function or "
                "label smoothing of its own takes the labels away): use svdpeft.Trainer, or mode='decoupled'"
            )
        # A loss that the model normalises over the whole accumulated batch is not divided by its steps later on.
        normalised = kwargs.get("num_items_in_batch") is not None
        output.loss = output.loss + penalty / (self.accumulates if normalised else 1)


def release(adapter: Adapter) -> None:
    """Take a callback's penalty out of the model, should a training have been interrupted."""
    if (handle := AdapterCallback.hooks.pop(adapter, None)) is not None:
        handle.remove()


def micro_batches(accumulation: int, batches: Any, state: TrainerState) -> int:
    """Number of batches of the optimizer step that begins: the last one of an epoch may have fewer.

    Example:
        >>> state = TrainerState(global_step=5)  # three steps of two, two and one batches in an epoch
        >>> micro_batches(2, range(5), state), micro_batches(2, range(6), state)
        (1, 2)
    """
    if not hasattr(batches, "__len__"):
        return accumulation
    whole, rest = divmod(len(batches), accumulation)
    last = rest and state.global_step % (whole + 1) == whole
    return rest if last else accumulation


def trained_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """What a checkpoint needs of the model's state dict: factors, parameters that train whole, changed statistics."""
    changed = adapter.contents().values
    state = adapter.model.state_dict()
    return {name: t.contiguous().clone() for name, t in state.items() if is_factor(name) or name in changed}
