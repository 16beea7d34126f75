"""What tests of tasks share: a small tokenizer and model, decoding the slow way, and what must not change."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from svdpeft.models import Loaded
from svdpeft.tasks import stories


@cache
def small_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer, without a padding token as many are."""
    small = Tokenizer(models.BPE())
    small.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    small.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    small.train_from_iterator([p.question + p.answer for p in stories.problems("train", 60)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=small, eos_token="<eos>")


def llama(tokenizer: Any, dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.4,  # far from uniform logits, so that greedy choices differ
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        return LlamaForCausalLM(config).to(dtype).eval()


def language(model: nn.Module, tokenizer: Any) -> Loaded:
    return Loaded(model, "tiny", tokenizer, "language", None)


def greedy(model: nn.Module, prompt: Tensor, steps: int, eos: int) -> list[int]:
    """The slow path: no batch, no padding, no cache."""
    ids = prompt[None]
    with torch.no_grad():
        while ids.shape[1] < len(prompt) + steps and (ids.shape[1] == len(prompt) or ids[0, -1] != eos):
            ids = torch.cat((ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return ids[0, len(prompt) :].tolist()


def mixed_modes() -> nn.Sequential:
    """A model whose submodules are in different modes, one of them a training child of a resting parent."""
    model = nn.Sequential(nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)), nn.Dropout(0.5))
    model[0].training = model[1].training = model[0][1].training = False
    return model


def random_states() -> tuple[Any, ...]:
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
