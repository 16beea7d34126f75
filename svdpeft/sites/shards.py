"""A tensor of which every process holds a part (FSDP2, DeepSpeed ZeRO-3): all of it, and writing into it.

A tensor that nobody has sharded is all of itself. What gathers or writes is a collective: all processes must come by.
Neither torch.distributed's tensors nor DeepSpeed are imported before somebody has sharded something with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def of_fsdp(tensor: Tensor | None) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def of_deepspeed(tensor: Tensor | None) -> bool:
    """Whether DeepSpeed's ZeRO-3 has it."""
    return hasattr(tensor, "ds_id")


def sharded(tensor: Tensor | None) -> bool:
    """Whether each process holds a part of it."""
    return of_fsdp(tensor) or of_deepspeed(tensor)


def check_whole(model: nn.Module, what: str) -> None:
    """Refuse a model whose parameters are sharded already.

    Args:
        model: that is to be changed.
        what: what cannot be done, for the message.

    Raises:
        ValueError: a parameter is sharded; the message names it.
    """
    found = next((name for name, p in model.named_parameters() if sharded(p)), None)
    if found is not None:
        raise ValueError(
            f"{found} is sharded over processes: {what} before fully_shard, accelerator.prepare, deepspeed.initialize "
            "or a training has distributed the model"
        )


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape of all of it: DeepSpeed leaves an empty tensor in the place of a shard."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def count(tensor: Tensor) -> int:
    """Number of values in all of it."""
    return math.prod(shape_of(tensor))


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor, a copy where it is sharded."""
    if not of_deepspeed(tensor):
        return differentiable(tensor)
    import deepspeed  # type: ignore[import-not-found]

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


def differentiable(tensor: Tensor) -> Tensor:
    """All of a parameter, for something whose gradient in it is the same in all processes."""
    if of_fsdp(tensor):
        return tensor.full_tensor()  # type: ignore[attr-defined]
    if of_deepspeed(tensor) and shape_of(tensor) != tuple(tensor.shape):
        tensor.all_gather()  # type: ignore[attr-defined]  # itself: DeepSpeed gives it up again after the backward pass
    return tensor


@torch.no_grad()
def write(tensor: Tensor, value: Tensor) -> None:
    """Copy a value, the same in all processes, into a tensor: each writes its own part."""
    if of_fsdp(tensor):
        like: Any = tensor
        tensor.copy_(_part(value.to(like.device, like.dtype), like))
    elif of_deepspeed(tensor):
        _write_deepspeed(tensor, value)
    else:
        tensor.copy_(value)


def _part(value: Tensor, like: Any) -> Tensor:
    """The same parts of a value as of a DTensor, without a word between processes."""
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = DTensor.from_local(value, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements)


def _write_deepspeed(parameter: Tensor, value: Tensor) -> None:
    import deepspeed  # type: ignore[import-not-found]

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)
    if hasattr(parameter, "_z3_optimizer"):  # it has a copy of what trains, from which it makes the parameter anew
        deepspeed.utils.safe_set_full_fp32_param(parameter, value.to(parameter.device, torch.float32))


def reshard(modules: Iterable[nn.Module]) -> None:
    """Let FSDP2 give up the whole weights that an evaluation has left: what is written there would be forgotten."""
    for module in modules:
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()  # type: ignore[operator]


def write_once(model: nn.Module, write_files: Callable[[], None]) -> None:
    """Write what was gathered: where the model is sharded one process does, and the others wait for it.

    Args:
        model: that it is of.
        write_files: writes.
    """
    if not any(map(sharded, model.parameters())):
        write_files()
        return
    try:
        if torch.distributed.get_rank() == 0:
            write_files()
    finally:
        torch.distributed.barrier()
