"""What an adapter needs of a training loop, for any trainer that calls transformers' callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.file import FOLDER
from svdpeft.training.divergence import check_skipped
from svdpeft.training.resume import load_training_state, save_training_state


class StepCallback(TrainerCallback):
    """Call ``before_step`` and ``after_step`` where the method's mathematics wants them.

    Args:
        adapter: attached to the model that is trained.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.skipped = 0  # steps in a row that a scaler of float16 left out

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.adapter.steps = state.global_step  # a resumed training goes on counting
        self.adapter.before_step(args.learning_rate, state.max_steps)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs["optimizer"]
        if getattr(optimizer, "step_was_skipped", False):  # fp16 overflow: the factors did not move either
            self.skipped += 1
            check_skipped(self.skipped)
            return
        self.skipped = 0
        # A scheduler scales all groups alike and notes their peaks; a role may have a learning rate of zero.
        peak, lr = max((group.get("initial_lr", args.learning_rate), group["lr"]) for group in optimizer.param_groups)
        self.adapter.after_step(lr / peak if peak else 0.0, state.max_steps)


class AdapterCallback(StepCallback):
    """Train an adapter with a stock ``transformers.Trainer``, or a trainer built on one (TRL and the like).

    Does what ``svdpeft.Trainer`` does without replacing it: calls the method around each step, adds its penalty to the
    loss that the model returns, and saves the adapter beside every checkpoint, in its folder ``adapter``. A resumed run
    finds what the method remembers in ``output_dir/checkpoint-N``.

    Args:
        adapter: attached to the model that is trained.

    Example::

        trainer = trl.SFTTrainer(model=model, callbacks=[svdpeft.AdapterCallback(adapter)], ...)
    """

    def __init__(self, adapter: Adapter) -> None:
        super().__init__(adapter)
        self._handle: RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        shared = next((n for n, site in self.adapter.sites.items() if site.factors.tied), None)
        if shared is not None and args.save_strategy != "no":
            raise ValueError(
                f"{self.adapter.sites[shared].method} shares tensors between sites, which a stock trainer cannot save "
                "with its model: use svdpeft.Trainer, or save_strategy='no' and adapter.save()"
            )
        if state.global_step:  # resumed: the trainer has loaded the model, factors and all
            load_training_state(self.adapter, self._folder(args, state))
        if self.adapter.penalty() is not None:
            self._handle = self.adapter.model.register_forward_hook(self._add_penalty)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._handle is not None:
            self._handle.remove()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.should_save and args.output_dir is not None:
            folder = self._folder(args, state)
            self.adapter.save(folder / FOLDER)
            save_training_state(self.adapter, folder)

    def _folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

    def _add_penalty(self, model: nn.Module, args: Any, output: Any) -> None:
        if not model.training:
            return
        if getattr(output, "loss", None) is None:
            raise RuntimeError(
                "the method adds a penalty to the loss, but the model returned none: use svdpeft.Trainer, or "
                "mode='decoupled'"
            )
        output.loss = output.loss + self.adapter.penalty()
