"""From an embedded model's own file to the layout of timm or transformers; done once, kept in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdpeft.models import cache, embedded

LAYOUT = 1  # of the converted files: count up when a conversion changes, so that old ones are not read


def state_dict(name: str, timm_name: str) -> dict[str, Tensor]:
    """Tensors of an embedded vision model, float32, under timm's names.

    Args:
        name: the embedded model.
        timm_name: the timm model that it becomes.

    Raises:
        AssetError: see ``embedded.fetch``.
        ValueError: timm's model has other tensors than the file.
    """
    from safetensors.torch import load_file, save_file

    def fill(folder: Path) -> None:
        tensors = VISION[name](embedded.fetch(name), timm_name)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")

    return load_file(cache.once(_folder(name), fill) / "model.safetensors")


def smollm2(name: str) -> Path:
    """Folder in transformers' layout, float32 safetensors and tokenizer, of the SmolLM2 shipped as GGUF."""
    return cache.once(_folder(name), lambda folder: _gguf(embedded.fetch(name), folder))


def _folder(name: str) -> str:
    return f"{embedded.get(name).folder}-converted-{LAYOUT}"


def _efficientnet_lite0(path: Path, timm_name: str) -> dict[str, Tensor]:
    """The file and timm hold the same tensors in the same order under other names."""
    import timm

    source = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):  # names and shapes will do
        target = timm.create_model(timm_name, pretrained=False).state_dict()
    if len(source) != len(target):
        raise ValueError(f"{path.name} has {len(source)} tensors, timm's {timm_name} has {len(target)}")
    tensors = {}
    for (old, value), (new, like) in zip(source.items(), target.items(), strict=True):
        if value.shape != like.shape or old.rpartition(".")[2] != new.rpartition(".")[2]:
            raise ValueError(f"{path.name}: {old} {tuple(value.shape)} cannot become {new} {tuple(like.shape)}")
        tensors[new] = value
    return tensors


def _dinov2_vits14(path: Path, timm_name: str) -> dict[str, Tensor]:
    """The backbone out of an ONNX graph: weights of linear layers are transposed there and have no names."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    named = {init.name: torch.from_numpy(numpy_helper.to_array(init).copy()) for init in graph.initializer}
    inputs = {node.name: node.input for node in graph.node}

    def copy(old: str, new: str) -> dict[str, Tensor]:
        return {f"{new}.{part}": named[f"backbone.{old}.{part}"] for part in ("weight", "bias")}

    def linear(block: int, old: str, new: str) -> dict[str, Tensor]:
        anonymous = inputs[f"/backbone/encoder/layer.{block}/{old}/MatMul"][1]
        bias = named[f"backbone.encoder.layer.{block}.{old.replace('/', '.')}.bias"]
        return {f"{new}.weight": named[anonymous].T, f"{new}.bias": bias}  # (in, out) -> (out, in)

    # The positions of the class token and of the 37x37 patches (518 pixels) are two constants of the graph.
    positions = [
        named[inputs["/backbone/embeddings/Concat_6"][0]],
        named[inputs["/backbone/embeddings/Reshape_1"][0]],
    ]
    tensors = {"cls_token": named["backbone.embeddings.cls_token"], "pos_embed": torch.cat(positions, dim=1)}
    tensors |= copy("embeddings.patch_embeddings.projection", "patch_embed.proj") | copy("layernorm", "norm")
    for i in range(12):
        old, new = f"encoder.layer.{i}", f"blocks.{i}"
        qkv = [linear(i, f"attention/attention/{part}", "") for part in ("query", "key", "value")]
        tensors |= {f"{new}.attn.qkv{key}": torch.cat([part[key] for part in qkv]) for key in (".weight", ".bias")}
        tensors |= linear(i, "attention/output/dense", f"{new}.attn.proj")
        for k in (1, 2):
            tensors |= copy(f"{old}.norm{k}", f"{new}.norm{k}") | linear(i, f"mlp/fc{k}", f"{new}.mlp.fc{k}")
            tensors[f"{new}.ls{k}.gamma"] = named[f"backbone.{old}.layer_scale{k}.lambda1"]
    return tensors


def _gguf(path: Path, folder: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # The weights are plain float32 by now, but a model that still remembers GGUF refuses to be saved.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)

    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The file asks for the "smollm" splitting, digits first, which the GGUF reader does not know: without it
    # a run of white space before a digit ("\n\n1") becomes other tokens than those SmolLM2 was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


VISION = {"efficientnet-lite0": _efficientnet_lite0, "dinov2-vits14": _dinov2_vits14}
