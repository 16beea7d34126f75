"""Small models in folders, as transformers and timm write them, and what is in such a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from helpers import adapt, bits, perturb
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import Tensor, nn

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SHARD = "3KB"


def seeded(build: Callable[[], Any], dtype: torch.dtype) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().to(dtype).eval()


def llama(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    config = transformers.LlamaConfig(**{"vocab_size": 40, **SMALL, **options})
    return seeded(lambda: transformers.LlamaForCausalLM(config), dtype)


def gpt2(dtype: torch.dtype = torch.bfloat16) -> Any:
    config = transformers.GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    return seeded(lambda: transformers.GPT2LMHeadModel(config), dtype)


def gpt_oss(dtype: torch.dtype = torch.bfloat16) -> Any:
    config = transformers.GptOssConfig(
        vocab_size=40, num_local_experts=3, num_experts_per_tok=2, head_dim=8, num_key_value_heads=1, **SMALL
    )
    return seeded(lambda: transformers.GptOssForCausalLM(config), dtype)


def mixtral(dtype: torch.dtype = torch.bfloat16) -> Any:
    """Its experts are one parameter in the model, and files of their own on the disk."""
    config = transformers.MixtralConfig(vocab_size=40, num_local_experts=2, num_key_value_heads=1, **SMALL)
    return seeded(lambda: transformers.MixtralForCausalLM(config), dtype)


def vit(dtype: torch.dtype = torch.float32) -> Any:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": 3}
    return seeded(lambda: timm.create_model("vit_tiny_patch16_224", **sizes), dtype), sizes


def resnet(dtype: torch.dtype = torch.float32) -> Any:
    return seeded(lambda: timm.create_model("resnet10t", num_classes=3), dtype), {"num_classes": 3}


def saved(model: Any, path: Path, **model_args: Any) -> Path:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(path, max_shard_size=SHARD)
    else:
        save_for_hf(model, path, model_args=model_args, safe_serialization=True)
    return path


def contents(path: Path) -> dict[str, tuple[str, torch.dtype, bytes]]:
    """Every tensor of a folder: its file, dtype and bits."""
    return {
        name: (file.name, t.dtype, bits(t))
        for file in path.glob("*.safetensors")
        for name, t in load_file(file).items()
    }


def tensors(path: Path) -> dict[str, Tensor]:
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def moved(model: nn.Module, method: Any, name: str = "default", size: float = 0.3, **options: Any) -> Any:
    adapter = adapt(model, method, name=name, **options)
    perturb(adapter, size, seed=len(name))
    return adapter


# Kinds of weights: a model, and what is adapted of it.
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "tied": (lambda: llama(tie_word_embeddings=True), {"targets": ["embed_tokens", "lm_head", "k_proj"]}),
    "tied float64": (lambda: llama(torch.float64, tie_word_embeddings=True), {"targets": ["embed_tokens", "lm_head"]}),
    "conv1d": (gpt2, {"targets": ["c_attn", "c_fc"]}),
    "parts": (gpt2, {"targets": ["c_attn[q]", "c_attn[v]"]}),
    "experts": (gpt_oss, {"targets": ["down_proj", "gate_up_proj[up]"]}),
    "beside experts of other names": (mixtral, {"targets": ["q_proj"]}),
    "rows": (llama, {"targets": ["q_proj"], "train": {"embed_tokens": [3, 7, 8]}}),
    "whole": (lambda: llama(torch.float32), {"targets": ["q_proj"], "train": ["norm", "lm_head"]}),
}
