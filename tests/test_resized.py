"""A base that is resized under its adapter is noticed, by site, before anything wrong is computed or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import svdpeft
from svdpeft import LoRA, PiSSA, attach


def llama(tied: bool = False) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.LlamaConfig(**sizes, vocab_size=30, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("size", [36, 20])
@pytest.mark.parametrize("method", [LoRA(rank=2), PiSSA(rank=2)], ids=str)
def test_it_is_named(method: Any, size: int, tmp_path: Path):
    model = llama()
    adapter = attach(model, method, ["embed_tokens"])
    adapter.save(tmp_path / "before")
    kept = {file.name: file.read_bytes() for file in (tmp_path / "before").iterdir()}
    model.resize_token_embeddings(size)
    words = rf"embed_tokens: its weight was \[30, 16\] when it was adapted and is \[{size}, 16\] now: resize"
    if size == 36:
        with pytest.raises(RuntimeError, match=words), torch.no_grad():
            model(torch.tensor([[31, 2]]))
    for act in (lambda: adapter.save(tmp_path / "before"), adapter.merge, lambda: adapter.save(tmp_path / "after")):
        with pytest.raises(RuntimeError, match=words):
            act()
    assert {file.name: file.read_bytes() for file in (tmp_path / "before").iterdir()} == kept
    assert not (tmp_path / "after").exists()


@pytest.mark.parametrize("replace", ["resize", "by hand"])
def test_a_layer_that_was_replaced_is_named(replace: str, tmp_path: Path):
    """transformers makes a new output layer when it resizes one that is not tied."""
    model = llama()
    adapter = attach(model, LoRA(rank=2), ["lm_head", "q_proj"])
    if replace == "resize":
        model.resize_token_embeddings(36)
    else:
        model.lm_head = torch.nn.Linear(16, 5)
    for act in (lambda: adapter.save(tmp_path / "a"), adapter.merge, adapter.fold, adapter.contents):
        with pytest.raises(RuntimeError, match="lm_head: its layer is no longer in the model, which has another"):
            act()
    assert not list(tmp_path.iterdir())
    adapter.detach()
    attach(model, LoRA(rank=2), ["lm_head", "q_proj"]).save(tmp_path / "a")


def test_resized_first_it_works(tmp_path: Path):
    model = llama()
    model.resize_token_embeddings(36)
    adapter = attach(model, LoRA(rank=2), ["embed_tokens", "lm_head"])
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
    ids = torch.tensor([[31, 2]])
    out = model(ids).logits
    adapter.save(tmp_path)
    adapter.detach()
    svdpeft.load(model, tmp_path)
    assert torch.equal(model(ids).logits, out)
