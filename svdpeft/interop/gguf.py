"""Export to llama.cpp: one GGUF file, which its programs take as ``--lora file.gguf`` beside the GGUF of the base.

The names are those of the ``gguf`` package, the layout is that of llama.cpp's conversion of the base (facts from
``convert_lora_to_gguf.py``, ``conversion/`` and ``src/llama-adapter.cpp`` of llama.cpp, MIT).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSOR, GGUFReader, GGUFType, GGUFWriter, Keys, get_tensor_name_map
from torch import Tensor, nn

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.saving import Contents
from svdpeft.atomic import replacing
from svdpeft.decomposition import all_finite
from svdpeft.interop.lora import as_lora, check_low_rank, contents_of
from svdpeft.registry import near_miss
from svdpeft.sites.site import Site

DType = Literal["f16", "f32"]
ARCHITECTURES = {  # classes of transformers whose conversion keeps their matrices, or permutes them as said below
    "GPT2LMHeadModel": MODEL_ARCH.GPT2,
    "Gemma2ForCausalLM": MODEL_ARCH.GEMMA2,
    "GemmaForCausalLM": MODEL_ARCH.GEMMA,
    "LlamaForCausalLM": MODEL_ARCH.LLAMA,
    "MistralForCausalLM": MODEL_ARCH.LLAMA,
    "Phi3ForCausalLM": MODEL_ARCH.PHI3,
    "Qwen2ForCausalLM": MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": MODEL_ARCH.QWEN3,
}
HEADS = {MODEL_TENSOR.ATTN_Q: "num_attention_heads", MODEL_TENSOR.ATTN_K: "num_key_value_heads"}
INSTEAD = "merge the adapter and convert the merged model"


def export_gguf(
    adapter: Adapter | Contents, path: str | os.PathLike[str], *, dtype: DType = "f16", max_rank: int | None = None
) -> dict[str, int]:
    """Write the adapter as a LoRA of llama.cpp, for the GGUF of the same base, quantised or not.

        W_gguf + α/r · B A        lora_a = A (r, in)    lora_b = B (out, r)    r of each tensor, one α per file

    Args:
        adapter: in any state, of a causal language model of transformers: Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2,
            Phi-3 or GPT-2; or what ``svdpeft.folders.opened`` gives of one that is on the disk with its model.
        path: of the new file.
        dtype: of the factors in the file, ``"f16"`` or ``"f32"``.
        max_rank: the nearest update of at most this rank at each weight, also of a method whose updates are of full
            rank; ``None`` is the exact update, of its exact rank.

    Returns:
        The rank at each adapted layer, by its name in the model. The parts of a fused weight are one.

    Raises:
        ValueError: an architecture that is not in the list; what llama.cpp's adapters do not hold: parameters trained
            whole, changed statistics, an update of full rank, tied embeddings; a number out of range.
        FileExistsError: ``path`` exists.
        OSError: it cannot be written whole.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))
        >>> adapter = svdpeft.attach(model, svdpeft.LoRA(rank=2), ["q_proj"])
        >>> svdpeft.export_gguf(adapter, getfixture("tmp_path") / "adapter.gguf")
        {'model.layers.0.self_attn.q_proj': 1}
    """
    path = Path(path)
    if dtype not in get_args(DType):
        raise ValueError(f"dtype {dtype!r}: {near_miss(str(dtype), get_args(DType))}")
    if path.exists():
        raise FileExistsError(f"{path} exists: an export does not overwrite")
    contents = contents_of(adapter)
    arch = _architecture(contents.model)
    check_low_rank(contents)
    weights = _weights(contents)
    named = {name: _named(name, sites, contents.model, arch) for name, sites in weights.items()}
    products = {name: as_lora(sites, max_rank)[0] for name, sites in weights.items()}
    ranks = {name: product.rank for name, product in products.items()}
    # llama.cpp multiplies every product by α/r: one α, and the r of the tensor. With B · r/α the scale is one at each;
    # with the largest rank for α no value of B grows by that.
    alpha = max(ranks.values())
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, (tensor, written) in named.items():
        left, right = products[name].L * (ranks[name] / alpha), products[name].A
        if arch is MODEL_ARCH.LLAMA and tensor in HEADS:
            left = _interleaved(left, getattr(contents.model.config, HEADS[tensor]))
        if tensor is MODEL_TENSOR.TOKEN_EMBD:  # rows of lora_a are looked up: (tokens, r), and lora_b is (width, r)
            left, right = right.mT, left
        tensors[f"{written}.weight.lora_a"] = _array(right, dtype, name)
        tensors[f"{written}.weight.lora_b"] = _array(left, dtype, name)
    with replacing(path) as new:
        with closing(GGUFWriter(new, MODEL_ARCH_NAMES[arch])) as writer:
            writer.add_type(GGUFType.ADAPTER)
            writer.add_string(Keys.Adapter.TYPE, "lora")
            writer.add_float32(Keys.Adapter.LORA_ALPHA, float(alpha))
            for name, values in tensors.items():
                writer.add_tensor(name, values)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        _check_whole(new, path)
    return ranks


def _check_whole(new: Path, path: Path) -> None:
    """numpy's ``tofile``, which writes the tensors, does not say that the last bytes of one had no room on the disk."""
    try:
        GGUFReader(new)
    except (ValueError, IndexError) as error:
        raise OSError(f"{path} could not be written whole: is there room on the disk?") from error


def _architecture(model: nn.Module) -> MODEL_ARCH:
    name = type(model).__name__
    if name not in ARCHITECTURES:
        raise ValueError(f"no export to llama.cpp for {name}, only for {', '.join(ARCHITECTURES)}; {INSTEAD}")
    return ARCHITECTURES[name]


def _weights(adapter: Contents) -> dict[str, list[Site]]:
    """The sites by the name of the layer whose weight they adapt: several where they are parts of it."""
    names = {id(module): name for name, module in adapter.model.named_modules()}
    found: dict[str, list[Site]] = {}
    for site in adapter.sites.values():
        found.setdefault(names[id(site.owners[0])], []).append(site)
    return found


def _named(name: str, sites: Sequence[Site], model: Any, arch: MODEL_ARCH) -> tuple[MODEL_TENSOR, str]:
    """What llama.cpp calls a weight, if its adapters reach it."""
    found = get_tensor_name_map(arch, model.config.num_hidden_layers).get_type_and_name(name)
    tensor = found and found[0]
    # Positions are looked up, too, but without a look at the adapters.
    reached = {"embedding"} if tensor is MODEL_TENSOR.TOKEN_EMBD else {"linear", "hf-conv1d"}
    kinds = {site.kind.name for site in sites}  # a projection head by head is one of its own
    if found is None or not kinds <= reached:
        known, what = MODEL_ARCH_NAMES[arch], ", ".join(sorted(kinds))
        raise ValueError(f"llama.cpp's adapters for {known!r} do not reach {name}, of kind {what!r}; {INSTEAD}")
    # Of tied embeddings llama.cpp has one tensor, with which it also multiplies: by factors that lie the other way.
    tied = model.config.tie_word_embeddings and tensor in (MODEL_TENSOR.TOKEN_EMBD, MODEL_TENSOR.OUTPUT)
    if tied or len(sites[0].owners) > 1:
        raise ValueError(
            f"{name} shares its weight with another layer: llama.cpp's adapters cannot say that; {INSTEAD}"
        )
    return found


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """The rows of each head in the order of llama.cpp's Llama: 0, d/2, 1, d/2 + 1, … of the d rows of transformers.

    Rotary embeddings turn pairs of rows: in transformers row i of the first half of a head with row i of the second,
    in the original Llama and in llama.cpp neighbours. The conversion of the base permutes queries and keys like this.
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _array(factor: Tensor, dtype: DType, name: str) -> np.ndarray[Any, Any]:
    values = factor.cpu().to(torch.float16 if dtype == "f16" else torch.float32)
    if not all_finite(values):
        raise ValueError(
            f"the update of {name} has factors of up to {factor.abs().max():.3g}, which {dtype} cannot hold"
        )
    return values.contiguous().numpy()
