"""Language models: transformers', from an embedded file, a local folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from svdpeft.models import convert, embedded
from svdpeft.registry import near_miss

EMBEDDED = {"smollm2-135m": convert.smollm2, "minilm-l6": embedded.fetch}


def folder_of(name: str) -> Path:
    """The folder in which a model of transformers lies: itself, that of an embedded one, or the hub's copy here.

    Args:
        name: a folder, an embedded name, or ``"hf:NAME"``.

    Raises:
        ValueError: none of these.
        OSError: the hub does not give it.
    """
    if name in EMBEDDED:
        return Path(EMBEDDED[name](name))
    if name.startswith("hf:"):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name.removeprefix("hf:"), ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf"]))
    if not Path(name).is_dir():
        raise ValueError(f"{name} does not exist; nor is it hf:NAME or an embedded model: {near_miss(name, EMBEDDED)}")
    return Path(name)


def build(
    name: str,
    *,
    hub: bool,
    dtype: torch.dtype,
    num_classes: int | None = None,
    seed: int = 0,
    weights: bool = True,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any, tuple[str, ...]]:
    """Build a pretrained transformers model and its tokenizer; see ``svdpeft.models.load``.

    Args:
        name: on the hub where ``hub``, else an embedded name, a local folder or a configuration.
        hub: whether the name is one of the hub: a causal language model. Else the model's configuration says
            whether it is a causal language model or an encoder.
        dtype: of the weights.
        num_classes: size of a fresh classifier of texts; ``None``: none.
        seed: of the classifier.
        weights: ``False``: on the meta device, without a tokenizer.
        trust_remote_code: run Python files that lie beside the weights; left out, transformers would ask on the
            terminal.

    Returns:
        The model, its tokenizer, the names of what is new on it: the classifier last, none without one.
    """
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    place = str(EMBEDDED[name](name)) if not hub and name in EMBEDDED else name
    if num_classes is not None and num_classes < 2:
        raise ValueError(f"num_classes {num_classes} is below 2")
    more = {} if num_classes is None else {"num_labels": num_classes}
    trust = {"trust_remote_code": trust_remote_code}
    config: Any = AutoConfig.from_pretrained(place, **trust, **more)
    architectures = None if hub else config.architectures
    causal = architectures is None or architectures[0].endswith(("ForCausalLM", "LMHeadModel"))
    kind = AutoModelForCausalLM if causal else AutoModel
    if num_classes is not None:
        kind = AutoModelForSequenceClassification
        torch.default_generator.manual_seed(seed)  # the classifier depends on its shape and the seed alone
    if not weights:
        with torch.device("meta"):
            model: Any = kind.from_config(config, dtype=dtype, **trust)
        tokenizer: Any = None
    else:
        model = kind.from_pretrained(place, dtype=dtype, **trust, **more)
        tokenizer = AutoTokenizer.from_pretrained(place, **trust)
    if num_classes is None:
        return model, tokenizer, ()
    if model.config.pad_token_id is None:  # a decoder finds the last token of a text by it
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id) if weights else (0,)
        model.config.pad_token_id = next((token for token in known if token is not None), None)
    beside = [(each, module) for each, module in model.named_children() if each != model.base_model_prefix]
    # DeBERTa's pooler and DistilBERT's first layer are no part of what was pretrained either.
    return model, tokenizer, tuple(each for each, module in beside if any(True for _ in module.parameters()))
