"""Against llama.cpp, where its Python package is installed: base and exported adapter compute the adapted model."""

import contextlib

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from gguf_base import dequantised, finish, smollm2
from helpers import near_by_change
from test_gguf import CONFIGS, expected_names, in_their_layout, model_of, tuned
from torch import nn

import svdpeft
from svdpeft.interop.gguf import ARCHITECTURES

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

__all__ = ["smollm2"]  # a fixture
IDS = [3, 17, 5, 31, 8, 2, 29, 11]


def write_base(model, path):
    """A model in float32 as llama.cpp's conversion has it, without a tokenizer."""
    config, arch = model.config, ARCHITECTURES[type(model).__name__]
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or config.n_inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(8)
        writer.add_key_length(8)
        writer.add_value_length(8)
        writer.add_rope_freq_base(10000.0)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    if arch.name == "GEMMA2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    if arch.name == "PHI3":
        writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)
        writer.add_sliding_window(0)
    names, modules = get_tensor_name_map(arch, config.num_hidden_layers), dict(model.named_modules())
    for name, value in model.named_parameters():  # of tied ones the first
        layer = name.rpartition(".")[0]
        value = value.detach()
        if type(modules[layer]).__name__ == "Conv1D" and value.ndim == 2:
            value = value.T
        if arch.name.startswith("GEMMA") and value.ndim == 1:  # its norms multiply by 1 + weight
            value = value + 1
        value = in_their_layout(model, layer, value)  # biases of queries and keys, too
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(written, np.ascontiguousarray(value.float().numpy()))
    finish(writer)


def running(base, lora=None):
    """The program, with a cache in float32."""
    options = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False}
    full = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    lora_path = None if lora is None else str(lora)
    return contextlib.closing(llama_cpp.Llama(str(base), lora_path=lora_path, **options, **full))


def logits_of(base, ids, lora=None):
    with running(base, lora) as llama:
        llama.eval(ids)
        return torch.from_numpy(np.array(llama.scores[: len(ids)]))


@torch.no_grad()
def ours(model, ids):
    return model(torch.tensor([ids])).logits[0]


def moderate(model):
    """Weights so large that every layer matters: transformers draws them with a deviation of 0.02."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_the_adapted_model(name, tmp_path):
    model = moderate(model_of(name))
    write_base(model, tmp_path / "base.gguf")
    base = ours(model, IDS)
    torch.testing.assert_close(logits_of(tmp_path / "base.gguf", IDS), base, rtol=1e-3, atol=1e-3)
    targets = [*expected_names(name), *([] if model.config.tie_word_embeddings else ["lm_head", "embed_tokens"])]
    adapter = tuned(model, svdpeft.SORSA(rank={r".*(c_proj|o_proj)": 3, ".*": 2}), targets)
    svdpeft.export_gguf(adapter, tmp_path / "lora.gguf", dtype="f32")
    found = logits_of(tmp_path / "base.gguf", IDS, tmp_path / "lora.gguf")
    near_by_change(found, ours(model, IDS), base, 1e-3)


def test_a_real_model_chooses_the_same_tokens(smollm2, tmp_path):
    path, loaded = smollm2
    dequantised(path, tmp_path / "base.gguf")
    ids = loaded.processor("The old king had three daughters, and the youngest")["input_ids"]
    base = ours(loaded.model, ids)
    adapter = tuned(loaded.model, svdpeft.PiSSA(rank=4, driver="randomized"), [r".*layers\.\d+\..*_proj"])
    try:
        svdpeft.export_gguf(adapter, tmp_path / "lora.gguf")
        with running(tmp_path / "base.gguf", tmp_path / "lora.gguf") as llama:
            llama.eval(ids)
            found, greedy = torch.from_numpy(np.array(llama.scores[: len(ids)])), list(ids)
            for _ in range(16):
                greedy.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
                llama.eval(greedy[-1:])
        adapted = ours(loaded.model, greedy)
    finally:
        adapter.detach()
        (tmp_path / "base.gguf").unlink()  # half a gigabyte
    near_by_change(found, adapted[: len(ids)], base, 5e-3)  # a file of half precision
    assert greedy[len(ids) :] == adapted.argmax(-1)[len(ids) - 1 : -1].tolist()
