"""rwkv7-hf's RWKV-7 with a ``generate`` that carries its state under every release of transformers."""

from __future__ import annotations

from typing import Any

import rwkv7_hf
from torch import Tensor

from svdpeft.models.rwkv_steps import Stepping


class RWKV7ForCausalLM(Stepping, rwkv7_hf.RWKV7ForCausalLM):
    """The package's model, in name too."""

    accepts_loss_kwargs = False  # it takes num_items_in_batch and ignores it: a trainer is to divide by its steps
    carried = "past_key_values"

    @staticmethod
    def pick(state: Any, rows: Tensor) -> Any:
        """The state of some rows of a batch."""
        return state.reorder_cache(rows)
