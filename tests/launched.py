"""What a launcher starts in tests/test_launchers.py: trains every method, interrupts it, resumes and saves; or
trains one and waits in the middle for somebody to kill it, which the next start resumes first."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import svdpeft
from svdpeft.decomposition import svd

METHODS = {
    "sorsa": svdpeft.SORSA(rank=3, gamma=0.05),
    "sorsa-loss": svdpeft.SORSA(rank=3, gamma=0.05, mode="loss"),
    "sorsa-adaptive": svdpeft.SORSA(rank=3, gamma={"target": 0.01}),
    "pissa": svdpeft.PiSSA(rank=3),
    "svft": svdpeft.SVFT(pattern="banded"),
    "lora": svdpeft.LoRA(rank=3),
    "lora-corrected": svdpeft.LoRA(rank=3),
    "vera": svdpeft.VeRA(rank=5),
    "adalora": svdpeft.AdaLoRA(rank=3, allocate={"target_rank": 2}),
    "lora-dash": svdpeft.LoRADash(rank=3, directions=2, warmup=2),
}
AROUND = {"lora-corrected": {"loraplus_ratio": 2.0, "gradients": "lora-pro"}}  # arguments of the trainer
SHARDED = os.environ.get("ACCELERATE_USE_FSDP") == "true"
# They keep a state, or act on gradients.
NOT_WITH_DEEPSPEED = {"sorsa-adaptive", "adalora", "lora-dash", "lora-corrected"}
TO_BE_KILLED = "adalora"  # it has the most to remember
TARGETS = ("q_proj", "v_proj", "down_proj")
STEPS, SAVED, KILLED = 3, 1, 2  # in all, until the checkpoint, and until the interruption


def model(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype)


def data() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(32, (16, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


class Killed(Exception):
    """In the middle of a training."""


class Kill(transformers.TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED:
            raise Killed


class Wait(transformers.TrainerCallback):
    """Says which process this is, in the middle of a training, and waits for its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED:
            (self.folder / f"{distributed.get_rank()}-is-{os.getpid()}").touch()
            time.sleep(300)
            raise Killed


def train(folder: Path, name: str, dtype: torch.dtype, **options: Any) -> list[float]:
    """One training from the start, or from its last checkpoint; its losses, and its adapter in ``folder/final``."""
    base, resume = model(dtype), options.pop("resume", False)
    adapter = svdpeft.attach(base, METHODS[name], TARGETS, train=["lm_head"])
    trainer = svdpeft.Trainer(
        model=base,
        adapter=adapter,
        args=transformers.TrainingArguments(
            str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1)),
            learning_rate=1e-2,
            max_grad_norm=1.0,
            optim="adamw_torch",
            report_to="none",
            disable_tqdm=True,
            save_steps=SAVED,
            logging_steps=1,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=3,
        ),
        train_dataset=data(),
        **AROUND.get(name, {}),
        **options,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}") if resume else None)
    if trainer.shards or trainer.is_world_process_zero():
        adapter.save(folder / "final", bases="stored")  # a sharded weight's are, and they are compared
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


class Gathers(TorchDispatchMode):
    """How many values each collective within the block has gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and "gather" in func.__name__:
            self.sizes.append(max(t.numel() for t in torch.utils._pytree.tree_leaves((args, out)) if _plain(t)))
        return out


def _plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not hasattr(value, "full_tensor")


def collectives(folder: Path) -> dict[str, Any]:
    """What one step and a save gather, with fully_shard called by hand."""
    from torch.distributed.fsdp import fully_shard

    base = model(torch.float64)
    sizes = {name: p.numel() for name, p in base.named_parameters() if p.ndim > 1}
    adapter = svdpeft.attach(base, METHODS["sorsa"], TARGETS)
    blocks = [*base.model.layers, base]
    for block in blocks:
        fully_shard(block)
    groups, seen = [], set()
    for block in blocks:
        mine = {n: p for n, p in block.named_parameters() if id(p) not in seen}
        seen |= {id(p) for p in mine.values()}
        groups.append(sum(-(-p.shape[0] // 2) * 2 * p[0].numel() for p in mine.values()))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-2)
    ids = torch.stack([row["input_ids"] for row in data()[:2]])
    with Gathers() as training:
        base(input_ids=ids, labels=ids).loss.backward()
    with Gathers() as step:
        adapter.before_step(1e-2, 3)
        optimizer.step()
        adapter.after_step(1.0)
    with torch.no_grad():
        base(input_ids=ids)  # which leaves whole what is not of a block
    with Gathers() as saving:
        adapter.save(folder / "gathered")
    try:
        adapter.merge()
        merge = ""
    except ValueError as error:
        merge = str(error)
    try:
        svdpeft.attach(base, METHODS["lora"], name="second")
        attach = ""
    except ValueError as error:
        attach = str(error)
    return {
        "groups": groups,
        "training": training.sizes,
        "step": step.sizes,
        "saving": saving.sizes,
        "factors": [
            -(-p.shape[0] // 2) * 2 * p[0].numel() for s in adapter.sites.values() for p in s.factors.parameters()
        ],
        "smallest": min(sizes.values()),
        "merge": merge,
        "attach": attach,
    }


def start_fsdp_on_a_cpu() -> None:
    """accelerate takes up its FSDP plugin where it finds accelerators; the rest of it works without."""
    start = AcceleratorState.__init__

    def started(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = started


def to_be_killed(folder: Path, dtype: torch.dtype) -> None:
    """One training, which waits in the middle; ``main`` goes on with it."""
    train(folder / "killed", TO_BE_KILLED, dtype, callbacks=[Wait(folder)])


def main(folder: Path, dtype: torch.dtype) -> None:
    decomposed: Counter[str] = Counter()
    exact = svd.full_svd

    def counted(w: torch.Tensor, where: str, wanted: torch.dtype) -> Any:
        decomposed[where] += 1
        return exact(w, where, wanted)

    svd.full_svd = counted
    zero = "ACCELERATE_USE_DEEPSPEED" in os.environ
    found: dict[str, Any] = {"losses": {}, "refused": {}}
    with svdpeft.svd_cache(folder / "svd"):
        if (folder / "killed").exists():
            found["killed"] = train(folder / "killed", TO_BE_KILLED, dtype, resume=True)
        for name in METHODS:
            if zero and name in NOT_WITH_DEEPSPEED:
                try:
                    train(folder / name, name, dtype)
                except ValueError as error:
                    found["refused"][name] = str(error)
                continue
            try:
                train(folder / name, name, dtype, callbacks=[Kill()])
            except Killed:
                found["losses"][name] = train(folder / name, name, dtype, resume=True)
    found["decomposed"] = dict(decomposed)
    if SHARDED:
        found["collectives"] = collectives(folder)
    (folder / f"{distributed.get_rank()}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if SHARDED:
        start_fsdp_on_a_cpu()
    where, precision = Path(sys.argv[1]), getattr(torch, sys.argv[2])
    to_be_killed(where, precision) if sys.argv[3:] == ["wait"] else main(where, precision)
