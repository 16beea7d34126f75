"""Chosen rows of an embedding: new tokens that train, travel with the adapter and fit any base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import bits
from torch import Tensor, nn
from torch.nn import functional as F

import svdpeft
from svdpeft import CheckpointError, LoRA, PiSSA, Whole, attach, load

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

OLD, NEW = 40, 43
ROWS = [5, *range(OLD, NEW)]  # one that was there, and three new ones
IDS = torch.tensor([[40, 5, 41, 3, 42, 40, 1], [7, 7, 41, 2, 9, 30, 39]])
both = pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])


def llama(tied: bool = True, tokens: int = OLD, seed: int = 0, **options: Any) -> Any:
    """The same base for the same seed; resized, its new rows are drawn anew."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=OLD, tie_word_embeddings=tied, **sizes, **options)
    model = transformers.LlamaForCausalLM(config).double().eval()
    if tokens != OLD:
        torch.manual_seed(100 + seed)
        model.resize_token_embeddings(tokens, mean_resizing=False)
    torch.set_rng_state(state)
    return model


def rows(tied: bool, which: Any = ROWS) -> dict[str, Any]:
    return {"embed_tokens": which} if tied else {"embed_tokens": which, "lm_head": which}


def moved(adapter: Any, seed: int = 0) -> Any:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return adapter


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def state(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(t) for name, t in model.state_dict().items()}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@both
def test_rows_train_as_the_whole_embedding_would(tied: bool):
    """Beside an oracle: the whole embedding trains, and all other rows are put back after every step."""
    model, oracle = llama(tied, NEW), llama(tied, NEW)
    adapter = attach(model, svdpeft.HeadOnly(), train=rows(tied))
    assert set(adapter.sites) == {"model.embed_tokens[rows]"} | (set() if tied else {"lm_head[rows]"})
    assert adapter.trainable_count == len(ROWS) * 16 * (1 if tied else 2)
    assert torch.equal(logits(model), logits(oracle)), "the start is the base"
    oracle.requires_grad_(False)
    ends = {oracle.get_input_embeddings().weight, oracle.lm_head.weight}
    before = [w.detach().clone() for w in ends]
    others = [row for row in range(NEW) if row not in ROWS]
    for w in ends:
        w.requires_grad_(True)
    steps = [(model, torch.optim.Adam(adapter.parameters(), 0.01)), (oracle, torch.optim.Adam(list(ends), 0.01))]
    for _ in range(4):
        losses = []
        for each, optimizer in steps:
            loss = F.cross_entropy(each(IDS[:, :-1]).logits.flatten(0, 1), IDS[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        with torch.no_grad():
            for w, was in zip(ends, before, strict=True):
                w[others] = was[others]
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    close(logits(model), logits(oracle))
    adapter.merge()
    close(logits(model), logits(oracle))
    close(model.get_input_embeddings()._parameters["weight"], oracle.get_input_embeddings().weight)
    adapter.unmerge()
    with adapter.disabled():
        assert torch.equal(logits(model), logits(llama(tied, NEW)))


@both
@pytest.mark.parametrize("base", ["smaller", "resized by somebody else"])
def test_an_adapter_brings_its_rows_to_a_base_that_has_none_or_others(tied: bool, base: str, tmp_path: Path):
    model = llama(tied, NEW, seed=1)
    adapter = moved(attach(model, PiSSA(rank=2), train=rows(tied)))
    adapter.save(tmp_path / "a")
    other = llama(tied) if base == "smaller" else llama(tied, NEW, seed=2)
    if base != "smaller":
        assert not torch.equal(logits(other), logits(llama(tied, NEW, seed=1)))
    drawn = torch.get_rng_state()
    loaded = load(other, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), drawn), "resizing draws nothing from the user's generator"
    assert other.config.vocab_size == NEW
    assert other.get_input_embeddings().num_embeddings == NEW
    ends = [layer._parameters["weight"] for layer in (other.get_input_embeddings(), other.lm_head)]
    assert (ends[0] is ends[1]) == tied
    close(logits(other), logits(model))
    with loaded.disabled():
        close(logits(other, IDS % OLD)[..., :OLD], logits(llama(tied), IDS % OLD))
    loaded.merge(permanent=True)
    close(logits(other), logits(model))
    other.save_pretrained(tmp_path / "merged")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    close(logits(plain), logits(model))


@both
def test_an_update_of_the_same_weight_adds_up_and_travels(tied: bool, tmp_path: Path):
    """The hash of a weight leaves out the rows that the adapter has values for, for its other sites as well."""
    model = llama(tied, NEW, seed=1)
    targets = {"embed_tokens": PiSSA(rank=2), "lm_head": PiSSA(rank=2), "q_proj": LoRA(rank=2)}
    adapter = moved(attach(model, None, targets, train=rows(tied)))
    adapter.save(tmp_path / "a")
    for base in (llama(tied), llama(tied, NEW, seed=2)):
        load(base, tmp_path / "a")
        close(logits(base), logits(model))
    changed = llama(tied, NEW, seed=2)
    with torch.no_grad():
        changed.get_input_embeddings().weight[6, 0] += 1e-6
    with pytest.raises(CheckpointError, match="another base"):
        load(changed, tmp_path / "a")


def test_an_embedding_that_trains_whole_resizes_the_base_too(tmp_path: Path):
    model = llama(True, NEW, seed=1)
    moved(attach(model, LoRA(rank=2), train=["embed_tokens"])).save(tmp_path / "a")
    base = llama(True)
    load(base, tmp_path / "a")
    close(logits(base), logits(model))


def test_in_bfloat16_rows_train_in_float32():
    model = llama(True, NEW).bfloat16()
    before = logits(model)
    adapter = attach(model, LoRA(rank=2), train=rows(True))
    assert torch.equal(logits(model), before)
    assert adapter.sites["model.embed_tokens[rows]"].factors.W.dtype == torch.float32


@both
def test_each_adapter_has_rows_of_its_own(tied: bool, tmp_path: Path):
    """Two meanings of the same new tokens: switched, mixed in a batch, swapped and combined."""
    model = llama(tied, NEW)
    a, b = (moved(attach(model, LoRA(rank=2), ["q_proj"], train=rows(tied), name=n), i) for i, n in enumerate("ab"))
    alone = {}
    for name in "ab":
        with svdpeft.only(model, name):
            alone[name] = logits(model)
    with a.per_example(["a", "b"]):
        mixed = logits(model)
    close(mixed, torch.stack([alone["a"][0], alone["b"][1]]))
    made = svdpeft.combine([(a, 0.7), (b, 0.3)])
    w0 = llama(tied, NEW).get_input_embeddings().weight.detach()[ROWS]
    ws = [svdpeft.adapters(model)[n].sites["model.embed_tokens[rows]"].factors.W for n in ("a", "b", "combined")]
    close(ws[2], w0 + 0.7 * (ws[0] - w0) + 0.3 * (ws[1] - w0))
    made.adapter.save(tmp_path / "c")
    with svdpeft.only(model, "combined"):
        combined = logits(model)
    base = llama(tied)
    load(base, tmp_path / "c")
    close(logits(base), combined)
    values = b.state_dict()
    svdpeft.only(model, "a")
    a.load_state_dict(values)
    close(logits(model), alone["b"])


def test_a_training_resumes_on_a_base_with_other_random_rows(tmp_path: Path):
    model = llama(True, NEW, seed=1)
    adapter = moved(attach(model, LoRA(rank=2), train=rows(True)))
    other = llama(True, NEW, seed=2)
    again = attach(other, LoRA(rank=2), train=rows(True))
    other.load_state_dict({k: v for k, v in model.state_dict().items() if ".svdpeft." in k}, strict=False)
    close(logits(other), logits(model))
    adapter.save(tmp_path / "a")
    svdpeft.adapter.loading.restore(moved(again, 5), tmp_path / "a")
    close(logits(other), logits(model))


REFUSED: list[tuple[Any, str]] = [
    ({"embed_tokens": [NEW]}, "has 43 rows, and 43 is none of them.*resize_token_embeddings"),
    ({"embed_tokens": [-1]}, "-1 is not the number of a row"),
    ({"embed_tokens": ["a"]}, "'a' is not the number"),
    ({"embed_tokens": [True]}, "True is not the number"),
    ({"embed_tokens": torch.tensor([True, False])}, r"tensor\(True\) is not the number"),
    ({"embed_tokens": 5}, "5 is no list of rows"),
    ({"embed_tokens": []}, "names no row"),
    ({"embed_tokens": [4, 3, 4]}, "names row 4 twice"),
    ({"embed_tokns": [4]}, "names no layer with a weight: did you mean 'embed_tokens'"),
    ({"embed_tokens": [4], "model.embed_tokens": [5]}, "named twice"),
    ({"embed_tokens": [4], "model.embed_tokens": None}, "is trained whole already"),
]


@pytest.mark.parametrize(("train", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_bad_rows_are_refused_and_nothing_changes(train: Any, message: str):
    model = llama(False, NEW)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        attach(model, LoRA(rank=2), train=train)
    assert state(model) == before
    assert not svdpeft.adapters(model)


def test_numbers_of_other_libraries_are_numbers():
    import numpy as np

    model = llama(True, NEW)
    for ids in (np.array([3, 41]), torch.tensor([41, 3]), {3, 41}):
        adapter = attach(model, svdpeft.HeadOnly(), train={"embed_tokens": ids})
        assert adapter.sites["model.embed_tokens[rows]"].kind.rows == ((3, 4, 1), (41, 42, 1))
        adapter.detach()


def test_rows_of_several_matrices_have_no_numbers():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    with pytest.raises(ValueError, match="a batch of matrices, whose rows have no numbers"):
        attach(Experts(), svdpeft.HeadOnly(), train={"conv": [1]})


def test_a_classifier_trains_some_of_its_classes():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
    adapter = attach(model, LoRA(rank=1), ["0"], train={"1": [0, 4]})
    moved(adapter)
    change = adapter.delta("1[rows]")
    assert change[[0, 4]].abs().min() > 0
    assert not change[1:4].any()


def test_padding_that_nobody_trained_is_refused_on_a_smaller_base(tmp_path: Path):
    model = llama(True, 48)
    moved(attach(model, LoRA(rank=2), train={"embed_tokens": range(OLD, NEW)})).save(tmp_path / "a")
    base = llama(True)
    before = state(base)
    with pytest.raises(CheckpointError, match=r"made with 48 tokens.*has 40; .* row 43 .*range\(40, 48\)"):
        load(base, tmp_path / "a")
    assert state(base) == before
    assert base.config.vocab_size == OLD


@both
def test_what_fails_after_resizing_takes_it_back(tied: bool, tmp_path: Path):
    moved(attach(llama(tied, NEW), LoRA(rank=2), ["q_proj"], train=rows(tied))).save(tmp_path / "a")
    base = llama(tied)
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    before, flags = state(base), [p.requires_grad for p in base.parameters()]
    with pytest.raises(CheckpointError, match="another base"):
        load(base, tmp_path / "a")
    assert state(base) == before
    assert [p.requires_grad for p in base.parameters()] == flags
    assert base.config.vocab_size == base.get_input_embeddings().num_embeddings == OLD


def test_embeddings_that_another_adapter_has_are_not_resized(tmp_path: Path):
    moved(attach(llama(True, NEW), LoRA(rank=2), train=rows(True))).save(tmp_path / "a")
    base = llama(True)
    attach(base, LoRA(rank=2), ["embed_tokens", "lm_head"], name="other")
    before = logits(base, IDS % OLD)
    with pytest.raises(CheckpointError, match="has an adapter already"):
        load(base, tmp_path / "a", name="b")
    assert torch.equal(logits(base, IDS % OLD), before)


def test_no_matrix_of_the_size_of_the_vocabulary_is_built(monkeypatch: pytest.MonkeyPatch):
    """Of an embedding and of an output layer, forward and backward: rows are looked up and added where they are."""
    model = llama(False, NEW)
    adapter = attach(model, svdpeft.HeadOnly(), train=rows(False))
    moved(adapter)
    expected = logits(model)
    for site in adapter.sites.values():
        monkeypatch.setattr(site.kind, "from_matrix", lambda *_: pytest.fail("built"))
        monkeypatch.setattr(site.kind, "_among_zeros", lambda *_: pytest.fail("built"))
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert torch.equal(logits(model), expected)


def test_copies_and_compiled_models_have_the_rows():
    model = llama(True, NEW)
    moved(attach(model, LoRA(rank=2), ["q_proj"], train=rows(True)))
    close(logits(copy.deepcopy(model)), logits(model))
    close(logits(torch.compile(model, backend="eager", fullgraph=True)), logits(model))


def test_whole_is_full_fine_tuning_of_a_part():
    layer = nn.MultiheadAttention(4, 2, batch_first=True)
    adapter = attach(layer, Whole(), ["in_proj_weight[q]"])
    assert adapter.trainable_count == 16


@pytest.mark.parametrize("method", ["oft", "boft", "dora"])
def test_a_method_that_depends_on_the_rows_binds_the_adapter_to_them(method: str):
    """Rows of the same weight are T(W0) + W − W0: on a base with other rows that would be something else."""
    options = {"dora": {"inner": LoRA(rank=2)}, "oft": {"block_size": 4}, "boft": {"block_size": 4}}[method]
    model = llama(False, NEW, seed=1)
    adapter = moved(attach(model, svdpeft.method(method)(**options), ["lm_head"], train=rows(False)))
    values = adapter.state_dict()
    for base in (llama(False), llama(False, NEW, seed=2)):
        with pytest.raises(CheckpointError, match="another base"):
            load(base, values)
    same = llama(False, NEW, seed=1)
    load(same, values)
    close(logits(same), logits(model))


@both
def test_modes_hooks_and_modules_stay_when_a_base_grows(tied: bool):
    values = moved(attach(llama(tied, NEW), LoRA(rank=2), ["q_proj"], train=rows(tied))).state_dict()
    base, seen = llama(tied), []
    head, embedding = base.lm_head, base.get_input_embeddings()
    head.register_forward_hook(lambda *_: seen.append(1))
    load(base, values)
    logits(base)
    assert seen == [1]
    assert base.lm_head is head
    assert base.get_input_embeddings() is embedding
    assert not any(module.training for name, module in base.named_modules() if "svdpeft" not in name)
    assert head.out_features == NEW


@both
def test_a_name_that_is_taken_leaves_everything_as_it_was(tied: bool):
    values = attach(llama(tied, NEW), LoRA(rank=2), ["q_proj"], train=rows(tied)).state_dict()
    base = llama(tied)
    attach(base, LoRA(rank=2), ["v_proj"])
    parameters, before = dict(base.named_parameters()), state(base)
    with pytest.raises(ValueError, match="attached already"):
        load(base, values)
    assert state(base) == before
    assert all(p is parameters[name] for name, p in base.named_parameters())
    assert base.lm_head.out_features == OLD


def test_new_rows_of_the_base_are_never_preferred():
    """With all logits below zero a row of zeros would be what greedy decoding says."""
    model, base = llama(True, NEW), llama(True)
    for each in (model, base):
        with torch.no_grad():
            each.model.norm.weight.fill_(1.0)
            each.get_input_embeddings().weight.abs_().mul_(-1)
            each.model.norm.register_forward_hook(lambda module, args, out: out.abs())
    values = attach(model, LoRA(rank=2), ["q_proj"], train={"embed_tokens": range(OLD, NEW)}).state_dict()
    before = logits(base, IDS % OLD)
    assert before.max() < 0
    loaded = load(base, values, check_base=False, enabled=False)
    assert torch.equal(logits(base, IDS % OLD).argmax(-1), before.argmax(-1))
    loaded.detach()
    assert torch.equal(logits(base, IDS % OLD).argmax(-1), before.argmax(-1))


def test_the_bias_of_an_output_layer_has_to_come_along():
    def phi(tokens: int = OLD) -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = transformers.PhiForCausalLM(transformers.PhiConfig(vocab_size=OLD, **sizes)).double().eval()
        with torch.no_grad():
            model.lm_head.bias.normal_()
        if tokens != OLD:
            model.resize_token_embeddings(tokens, mean_resizing=False)
        return model

    with pytest.raises(CheckpointError, match=r"row 40 of lm_head.bias.*train=\['lm_head.bias'\]"):
        load(phi(), attach(phi(NEW), LoRA(rank=2), ["q_proj"], train=rows(False)).state_dict())
    model, base = phi(NEW), phi()
    adapter = moved(attach(model, LoRA(rank=2), ["q_proj"], train={**rows(False), "lm_head.bias": None}))
    load(base, adapter.state_dict())
    close(logits(base), logits(model))


def test_models_without_token_embeddings_load_as_ever():
    """Some raise where they are asked for embeddings, or mean something else by the name."""

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

        def get_input_embeddings(self, x: Tensor) -> Tensor:
            return x

        def resize_token_embeddings(self, size: int) -> None:
            raise AssertionError

    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    for model in (Other(), transformers.ConvNextForImageClassification(config)):
        adapter = attach(model, LoRA(rank=2), "all-linear")
        values = adapter.state_dict()
        adapter.load_state_dict(values)
        adapter.detach()
        load(model, values)


def test_values_of_a_larger_vocabulary_are_not_swapped_in():
    values = attach(llama(False, NEW), LoRA(rank=2), ["q_proj"], train=["embed_tokens", "lm_head"]).state_dict()
    base = llama(False)
    slot = attach(base, LoRA(rank=2), ["q_proj"])
    before = state(base)
    with pytest.raises(CheckpointError, match="embed_tokens"):
        slot.load_state_dict(values)
    assert state(base) == before
    assert base.config.vocab_size == OLD


def test_rows_that_were_evaluated_in_inference_mode_train():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    adapter = attach(model, svdpeft.HeadOnly(), train={"1": [1, 2], "0": [3, 7]})
    with torch.inference_mode():
        model(torch.tensor([1, 3]))
    model(torch.tensor([1, 3])).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_an_adapter_of_fewer_tokens_says_what_to_do():
    values = [
        attach(llama(True, n), LoRA(rank=2), ["q_proj"], train={"embed_tokens": range(OLD, n)}).state_dict()
        for n in (42, NEW)
    ]
    base = llama(True)
    load(base, values[0], name="a")
    with pytest.raises(CheckpointError, match=r"as model.embed_tokens\[rows\].*different numbers of tokens"):
        load(base, values[1], name="b")
    svdpeft.adapters(base)["a"].detach()
    load(base, values[1], name="b")
    with pytest.raises(CheckpointError, match=r"this base has 43: model.resize_token_embeddings\(42\)"):
        load(base, values[0], name="a")


def test_one_user_of_a_tied_weight_and_rows_of_all_is_refused():
    with pytest.raises(ValueError, match="lm_head shares its weight with other layers and is to be adapted alone"):
        attach(llama(True, NEW), LoRA(rank=2), ["lm_head"], train={"embed_tokens": ROWS})


@pytest.mark.parametrize("kind", ["gemma", "bart"])
def test_scaled_embeddings_are_called(kind: str):
    """Of transformers' embeddings with a scale no matrix of the vocabulary's size is built either."""
    torch.manual_seed(0)
    if kind == "gemma":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
        config = transformers.Gemma3TextConfig(vocab_size=OLD, num_attention_heads=2, num_key_value_heads=1, **sizes)
        model = transformers.Gemma3ForCausalLM(config).double().eval()
        layer = model.get_input_embeddings()
    else:
        from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

        layer = BartScaledWordEmbedding(OLD, 6, 1, embed_scale=3.0).double()
        model = nn.Sequential(layer)
    ids = IDS % OLD
    for method, targets, train in (
        (svdpeft.HeadOnly(), (), {"embed_tokens" if kind == "gemma" else "0": [5, 7]}),
        (PiSSA(rank=2), ["embed_tokens", "lm_head"] if kind == "gemma" else ["0"], ()),
    ):
        base = layer(ids)
        adapter = moved(attach(model, method, targets or None, train=train))
        (site,) = adapter.sites.values()
        assert site.places[0].can_call
        with torch.no_grad():
            out = layer(ids)
        w = layer._parameters["weight"] + adapter.delta(site.name)
        close(out, F.embedding(ids, w) * layer.embed_scale)
        assert not torch.equal(out, base)
        adapter.detach()


def test_saving_twice_reads_the_base_once(monkeypatch: pytest.MonkeyPatch):
    from svdpeft.sites import weights

    model, read, really = llama(True, NEW), [], weights.digest
    adapters = [
        attach(model, LoRA(rank=2), ["embed_tokens", "lm_head"], name="a"),
        attach(model, svdpeft.HeadOnly(), train=rows(True), name="b"),
    ]
    monkeypatch.setattr(weights, "digest", lambda w: read.append(1) or really(w))
    for _ in range(3):
        for adapter in adapters:
            adapter.state_dict()
    assert len(read) == 2


def test_a_row_that_is_no_number_in_the_base_does_not_matter():
    values = moved(attach(llama(True, NEW), LoRA(rank=2), ["q_proj"], train=rows(True))).state_dict()
    base = llama(True, NEW)
    with torch.no_grad():
        base.get_input_embeddings().weight[OLD] = float("nan")
    load(base, values)
