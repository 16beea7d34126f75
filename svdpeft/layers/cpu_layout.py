"""The layout that bitsandbytes gives 4-bit weights for a CPU's kernel, and the way back from it."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def pass_gradients(model: nn.Module) -> None:
    """Take back the layout that bitsandbytes gives 4-bit weights for a CPU's kernel, which has no gradient.

    An evaluation without gradients makes it, with the scales rounded to bfloat16, and nothing else undoes it: the
    training that follows would stop, or silently have no gradient in the layers below.
    """
    for module in model.modules():
        tensor: Any = module._parameters.get("weight")
        if getattr(getattr(tensor, "quant_state", None), "packing_format_for_cpu", False):
            tensor.data, state = unpacked(tensor)
            vars(tensor.quant_state).update(vars(state))  # which others hold, too


def may_lose_gradients(model: nn.Module) -> bool:
    """Whether a layer of the model may come to have that layout."""
    return any(vars(module).get("support_avx512bf16_for_cpu", False) for module in model.modules())


def unpacked(tensor: Any) -> tuple[Tensor, Any]:
    """Return a 4-bit weight in the layout in which it is dequantised and saved, with its state."""
    state = tensor.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return tensor.data, state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    scales, state = state.absmax, copy.copy(state)
    state.original_nested = False  # the scales are no longer quantised themselves, and need not be again
    data, state = _convert_weight_packed_for_cpu_inverse(tensor.data, state)
    state.absmax = scales.T.reshape(-1).float()  # theirs leaves them transposed
    return data, state
