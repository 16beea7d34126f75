"""Language models: transformers', from an embedded file, a local folder or the hub."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from svdpeft.models import convert, embedded

EMBEDDED = {"smollm2-135m": convert.smollm2, "minilm-l6": embedded.fetch}


def build(name: str, *, hub: bool, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Build a pretrained transformers model and its tokenizer; see ``svdpeft.models.load``.

    Args:
        name: on the hub where ``hub``, else an embedded name or a local folder.
        hub: whether the name is one of the hub: a causal language model. Else the model's configuration says
            whether it is a causal language model or an encoder.
        dtype: of the weights.

    Returns:
        The model, its tokenizer.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    place = str(EMBEDDED[name](name)) if not hub and name in EMBEDDED else name
    architectures = None if hub else AutoConfig.from_pretrained(place).architectures
    causal = architectures is None or architectures[0].endswith(("ForCausalLM", "LMHeadModel"))
    kind = AutoModelForCausalLM if causal else AutoModel
    return kind.from_pretrained(place, dtype=dtype), AutoTokenizer.from_pretrained(place)
