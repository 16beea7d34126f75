"""``generate`` with a recurrent state, of which transformers need not know.

What transformers carries from one step to the next, and by which name, changes with its releases; a model that leans on
it would then read its whole text again for each token, and nothing would say so. Here the state lies in an object that
``generate`` gets as an argument of the model: those it hands on as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NO_STATE = "the step before returned no state, as RWKV-7 does in training mode: eval() first"
OTHER_TEXT = "this text is not one of the step before with more tokens, as in greedy decoding, sampling and beams it is"


class Memory:
    """A state and the text that it is of, from the first step of one ``generate`` to the last.

    Args:
        state: before the first step; None at the beginning of a text.
    """

    def __init__(self, state: Any = None) -> None:
        self.state = state
        self.text: Tensor | None = None  # tokens, and whether they are padding: (B, T, 2)

    def follow(self, ids: Tensor, mask: Tensor | None, pick: Callable[[Any, Tensor], Any]) -> tuple[int, str]:
        """Bring the state to the rows of a longer text, which beams choose anew at each step.

        Args:
            ids, mask: the whole text, (B, T) and (B, at least T).
            pick: the state and numbers of rows -> the state of these rows.

        Returns:
            How many tokens the state is of, and why it is lost ("" where it is not): then it is None.
        """
        padding = torch.ones_like(ids) if mask is None else mask[:, mask.shape[1] - ids.shape[1] :].to(ids)
        before, text = self.text, torch.stack((ids, padding), dim=-1)
        self.text = text
        if before is None:
            return 0, ""
        if self.state is None:
            return 0, NO_STATE
        known = before.shape[1]
        if known < ids.shape[1]:
            if torch.equal(text[:, :known], before):
                return known, ""
            same = (text[:, None, :known] == before).flatten(2).all(2)  # (B, rows before)
            if same.any(1).all():
                self.state = pick(self.state, same.int().argmax(1))
                return known, ""
        self.state = None
        return 0, OTHER_TEXT


class Stepping:
    """In front of a model whose ``forward`` takes and returns a state by the name ``carried``: each token is read once.

    ``generate`` is transformers' own. It reads everything for each token where ``use_cache=False`` says so; where it
    must, a warning says why.
    """

    carried = "state"
    pick: Callable[[Any, Tensor], Any]  # the state and numbers of rows -> the state of these rows; the old one is lost

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        return parent.generate(*args, memory=Memory(kwargs.pop(self.carried, None)), **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        memory: Memory | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        parent: Any = super()
        kwargs |= {"attention_mask": attention_mask, "use_cache": use_cache}
        if memory is None or use_cache is False:
            return parent.prepare_inputs_for_generation(input_ids, **kwargs)
        known, why = memory.follow(input_ids, attention_mask, self.pick)
        if why:
            warnings.warn(f"{type(self).__name__} reads the whole text again for a token: {why}", stacklevel=2)
        kwargs |= {"use_cache": True, self.carried: memory.state}
        inputs = parent.prepare_inputs_for_generation(input_ids, **kwargs)
        return inputs | {"memory": memory} | ({"input_ids": input_ids[:, known:]} if known else {})

    def __call__(self, *args: Any, memory: Memory | None = None, **kwargs: Any) -> Any:
        parent: Any = super()
        out = parent.__call__(*args, **kwargs)
        if memory is None:
            return out
        memory.state = state = out.get(self.carried)
        # Whatever its name is here: what transformers finds it carries too, and turns to the rows of beams once more.
        return type(out)(**{name: value for name, value in out.items() if value is not state})
