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
    name: str, *, hub: bool, dtype: torch.dtype, num_classes: int | None = None, seed: int = 0
) -> tuple[nn.Module, Any, tuple[str, ...]]:
    """Build a pretrained transformers model and its tokenizer; see ``svdpeft.models.load``.

    Args:
        name: on the hub where ``hub``, else an embedded name or a local folder.
        hub: whether the name is one of the hub: a causal language model. Else the model's configuration says
            whether it is a causal language model or an encoder.
        dtype: of the weights.
        num_classes: size of a fresh classifier of texts; ``None``: none.
        seed: of the classifier.

    Returns:
        The model, its tokenizer, the names of what is new on it: the classifier last, none without one.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    place = str(EMBEDDED[name](name)) if not hub and name in EMBEDDED else name
    if num_classes is not None:
        return _classifier(place, dtype, num_classes, seed)
    architectures = None if hub else AutoConfig.from_pretrained(place).architectures
    causal = architectures is None or architectures[0].endswith(("ForCausalLM", "LMHeadModel"))
    kind = AutoModelForCausalLM if causal else AutoModel
    return kind.from_pretrained(place, dtype=dtype), AutoTokenizer.from_pretrained(place), ()


def _classifier(place: str, dtype: torch.dtype, classes: int, seed: int) -> tuple[nn.Module, Any, tuple[str, ...]]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if classes < 2:
        raise ValueError(f"num_classes {classes} is below 2")
    tokenizer: Any = AutoTokenizer.from_pretrained(place)
    torch.default_generator.manual_seed(seed)  # the classifier depends on its shape and the seed alone
    model = AutoModelForSequenceClassification.from_pretrained(place, dtype=dtype, num_labels=classes)
    if model.config.pad_token_id is None:  # a decoder finds the last token of a text by it
        model.config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    beside = [(name, module) for name, module in model.named_children() if name != model.base_model_prefix]
    # DeBERTa's pooler and DistilBERT's first layer are no part of what was pretrained either.
    return model, tokenizer, tuple(name for name, module in beside if any(True for _ in module.parameters()))
