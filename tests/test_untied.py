"""One user of a tied weight, adapted alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import close, perturb, refused
from torch import Tensor, nn
from torch.nn import functional as F

import svdpeft
from svdpeft import OFT, LoRA, PiSSA, attach, load
from svdpeft.methods.base import PerSite

IDS = torch.tensor([[1, 4, 2], [0, 3, 5]])


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))


def by_hand(embed: Tensor, head: Tensor) -> Tensor:
    model = Language().double()
    return F.linear(torch.tanh(model.body(F.embedding(IDS, embed))), head).detach()


@pytest.mark.parametrize("method", [LoRA(rank=2), PiSSA(rank=2), OFT(block_size=2)], ids=str)
@pytest.mark.parametrize("user", ["embed", "head"])
def test_its_output_alone_changes(method: PerSite, user: str, tmp_path: Path):
    model = Language().double()
    base, shared = model(IDS), model.embed.weight
    w = shared.detach().clone()
    adapter = attach(model, method, [user])
    assert torch.equal(model(IDS), base)
    perturb(adapter)
    out = model(IDS)
    delta = adapter.delta(user)
    close(out, by_hand(w + delta, w) if user == "embed" else by_hand(w, w + delta))

    for call in (adapter.merge, adapter.merged_state_dict, *([] if isinstance(method, OFT) else [adapter.fold])):
        other = "head" if user == "embed" else "embed"
        with pytest.raises(ValueError, match=rf"{user} cannot be \w+: {other} has the same weight.*untie=True"):
            call()
        assert torch.equal(model(IDS), out)
    adapter.merge(untie=True)
    close(model(IDS), out)
    assert model.head.weight is not model.embed.weight
    adapter.save(tmp_path)
    adapter.unmerge()
    assert torch.equal(model(IDS), out)
    assert model.head._parameters["weight"] is model.embed._parameters["weight"] is shared
    adapter.detach()
    assert torch.equal(model(IDS), base)
    assert all(p.requires_grad for p in model.parameters())

    loaded = load(Language().double(), tmp_path)
    close(loaded.model(IDS), out)
    loaded.merge(permanent=True, untie=True)
    close(loaded.model(IDS), out)
    names = dict(loaded.model.named_parameters())
    assert {"embed.weight", "head.weight"} <= names.keys()
    assert all(p.requires_grad for p in names.values())


def test_a_merge_that_fails_leaves_it_tied():
    model = Language()
    adapter = attach(model, LoRA(rank=1), ["head"])
    with torch.no_grad():
        adapter.sites["head"].factors.L.fill_(float("inf"))
    with pytest.raises(ValueError, match="head cannot be merged"):
        adapter.merge(untie=True)
    assert model.head._parameters["weight"] is model.embed.weight


def test_a_broad_pattern_leaves_it_and_a_weight_that_is_read_is_refused():
    model = Language()
    assert (
        attach(model, LoRA(rank=1), "all-linear").skipped["head"].startswith("its weight is shared with embed, which")
    )
    raw = nn.ModuleDict({"a": nn.Module(), "b": nn.Module()})
    raw["a"].w = nn.Parameter(torch.randn(4, 3))
    raw["b"].w = raw["a"].w
    with refused(raw, "its weight is shared with b.w, which is not adapted"):
        attach(raw, LoRA(rank=1), ["a.w[in,out]"])


def test_with_an_adapter_at_the_other_user_it_cannot_be_untied():
    model = Language().double()
    first, second = attach(model, LoRA(rank=1), ["embed"], name="a"), attach(model, LoRA(rank=1), ["head"], name="b")
    perturb(first)
    perturb(second)
    out, w = model(IDS), model.embed._parameters["weight"].detach()
    close(out, by_hand(w + first.delta("embed"), w + second.delta("head")))
    with pytest.raises(ValueError, match="embed cannot be untied: another adapter adapts the weight, too"):
        first.merge(untie=True)
    assert first.state == "attached"
    assert torch.equal(model(IDS), out)
    second.detach()
    first.merge(untie=True)
    first.unmerge()


def test_a_model_of_transformers_is_saved_untied(tmp_path: Path):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=30, tie_word_embeddings=True, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    adapter = attach(model, LoRA(rank=2), ["lm_head"])
    perturb(adapter)
    ids = torch.tensor([[1, 5, 7]])
    out = model(ids).logits
    adapter.merge(untie=True)
    assert model.config.tie_word_embeddings is False
    adapter.unmerge()
    assert model.config.tie_word_embeddings is True
    adapter.merge(permanent=True, untie=True)
    torch.testing.assert_close(model(ids).logits, out)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, out)
    assert not svdpeft.adapters(model)


def test_the_weight_of_the_others_is_nobody_elses_while_it_is_untied():
    model = Language()
    first = attach(model, LoRA(rank=1), ["head"], name="a")
    perturb(first)
    first.merge(untie=True)
    with refused(model, "embed cannot be adapted: adapter 'a' has untied it"):
        attach(model, LoRA(rank=1), ["embed"], name="b")
    with refused(model, "embed.weight cannot be trained: adapter 'a' has untied it"):
        attach(model, LoRA(rank=1), ["body"], train=["embed"], name="b")
    first.unmerge()
    attach(model, LoRA(rank=1), ["embed"], name="b")
    with pytest.raises(ValueError, match=r"head cannot be merged"):
        first.merge()  # it was untied once, and is not asked to be again
