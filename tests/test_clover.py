"""CLOVER on attentions: the paper's formula in NumPy, which weights are pairs in real models, and the invariants."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, close, differs, equal_bits, near_by_change, perturb, refused, snapshot, weight_of
from oracle import Array, near
from torch import Tensor, nn

from svdpeft import CLOVER, LoRA, attach, load
from svdpeft.adapter.adapter import Adapter
from svdpeft.interop.peft_export import export_lora
from svdpeft.registry import KINDS
from svdpeft.targets.inventory import weights_of
from svdpeft.targets.pairs import Half, halves


class Attention(nn.Module):
    """Grouped-query attention, written out."""

    def __init__(self, width: int = 12, heads: int = 4, groups: int = 2, size: int = 3) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, size
        self.q_proj = nn.Linear(width, heads * size)
        self.k_proj = nn.Linear(width, groups * size)
        self.v_proj = nn.Linear(width, groups * size)
        self.o_proj = nn.Linear(heads * size, width + 1)

    def split(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return x.repeat_interleave(self.num_heads // x.shape[1], 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(self.v_proj(x))
        weights = (q @ k.mT).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(-2))


def attention(**sizes: int) -> tuple[nn.ModuleDict, Tensor]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": Attention(**sizes)}).double()
    return model, torch.randn(2, 5, 12, dtype=torch.float64)


# -- the formula -------------------------------------------------------------------------------------------------------


def array(t: Tensor) -> Array:
    return t.detach().numpy().copy()


def per_head(model: nn.ModuleDict) -> dict[str, Array]:
    """The four weights of each query head: (H, d, n), or (H, m, d) of the output projection."""
    a: Any = model["attn"]
    w = {name: array(a.get_submodule(f"{name}_proj")._parameters["weight"]) for name in "qkvo"}
    heads, size = a.num_heads, a.head_dim
    found = {name: w[name].reshape(-1, size, w[name].shape[1]) for name in "qkv"}
    for name in "kv":
        found[name] = np.repeat(found[name], heads // len(found[name]), 0)
    found["o"] = np.stack([w["o"][:, h * size : (h + 1) * size] for h in range(heads)])
    return found


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_products_are_the_papers(groups: int):
    model, x = attention(groups=groups)
    w = per_head(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    base = model["attn"](x)
    adapter = attach(model, CLOVER())
    assert list(adapter.sites) == ["attn.q_proj", "attn.o_proj"]
    assert torch.equal(model["attn"](x), base)
    moves = np.random.default_rng(0).standard_normal((2, 4, 3, 3))
    with torch.no_grad():
        for move, site in zip(moves, adapter.sites.values(), strict=True):
            site.factors.C += torch.from_numpy(move)
    adapter.merge()
    new = per_head(model)
    for h in range(4):
        for name, product, merged, move in (
            ("q", w["q"][h].T @ w["k"][h], new["q"][h].T @ new["k"][h], moves[0, h].T),  # the operator of a query is Cᵀ
            ("o", w["o"][h] @ w["v"][h], new["o"][h] @ new["v"][h], moves[1, h]),
        ):
            u, s, vh = triplets(product, 3)
            site = adapter.sites[f"attn.{name}_proj"]
            near(site.factors.tensors()["C0"][h], np.diag(s))
            near(merged, u @ (np.diag(s) + move) @ vh)
    adapter.unmerge()
    unchanged = [n for n, p in before.items() if equal_bits(p, dict(model.named_parameters())[n])]
    assert unchanged == list(before)


def triplets(w: Array, rank: int) -> tuple[Array, Array, Array]:
    u, s, vh = np.linalg.svd(w)
    for i in range(rank):
        if u[np.abs(u[:, i]).argmax(), i] < 0:
            u[:, i], vh[i] = -u[:, i], -vh[i]
    return u[:, :rank], s[:rank], vh[:rank]


def without_biases(model: nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") and p.ndim == 1:
                p.zero_()


def test_the_function_is_the_papers_with_both_weights_replaced():
    """Queries U C, keys V; values V, outputs U C. Biases, which here act through the weight that stays, are zero."""
    model, x = attention(groups=4)
    without_biases(model)
    paper, base, w = copy.deepcopy(model), model["attn"](x), per_head(model)
    adapter = attach(model, CLOVER())
    perturb(adapter)
    weights: dict[str, list[Array]] = {name: [] for name in "qkvo"}
    for h in range(4):
        u, _, vh = triplets(w["q"][h].T @ w["k"][h], 3)
        weights["q"].append(array(adapter.sites["attn.q_proj"].factors.C[h]) @ u.T)
        weights["k"].append(vh)
        u, _, vh = triplets(w["o"][h] @ w["v"][h], 3)
        weights["o"].append(u @ array(adapter.sites["attn.o_proj"].factors.C[h]))
        weights["v"].append(vh)
    with torch.no_grad():
        for name, heads in weights.items():
            stack = np.concatenate(heads, 1 if name == "o" else 0)
            paper["attn"].get_submodule(f"{name}_proj").weight.copy_(torch.from_numpy(stack))
    assert differs(model["attn"](x), base)
    close(model["attn"](x), paper["attn"](x))


def test_what_trains_is_a_core_per_head():
    model, _ = attention()
    adapter = attach(model, CLOVER())
    assert adapter.trainable_count == 2 * 4 * 3**2
    assert {name: site.shape for name, site in adapter.sites.items()} == {
        "attn.q_proj": (4, 3, 12),
        "attn.o_proj": (4, 13, 3),
    }
    assert all(site.count == site.method.count(*site.shape) for site in adapter.sites.values())
    assert set(adapter.roles()) == {"C"}


def test_a_smaller_rank_trains_the_leading_block():
    model, _ = attention()
    full, model2 = attach(model, CLOVER()), attention()[0]
    half = attach(model2, CLOVER(rank=2))
    assert half.trainable_count == 2 * 4 * 4
    for name, site in half.sites.items():
        wide = full.sites[name].factors
        close(site.factors.C.detach(), wide.C[:, :2, :2].detach())
        close(site.factors.L.detach(), wide.L[..., :2].detach())
        close(site.factors.A.detach(), wide.A[:, :2].detach())
    model, _ = attention()
    with refused(model, "rank 4", "[1, 3]", "attn.q_proj"):
        attach(model, CLOVER(rank=4))


def test_hyper_parameters_that_cannot_be():
    for bad in ((), ("kv",), "q"):
        with pytest.raises(ValueError, match="qk, vo"):
            CLOVER(pairs=bad)  # type: ignore[arg-type]
    assert CLOVER(pairs="vo") == CLOVER(pairs=("vo",)) == CLOVER(pairs=["vo"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="alpha"):
        CLOVER(alpha=2.0)
    assert all("CLOVER" in (CLOVER().why_not(kind()) or "") for kind in KINDS.values())


def test_a_key_without_full_rank_is_refused():
    model, _ = attention()
    with torch.no_grad():
        model["attn"].v_proj.weight[4] = 2 * model["attn"].v_proj.weight[3]  # of the second value head
    with refused(model, "attn.o_proj", "rank-deficient in head 1", "exclude"):
        attach(model, CLOVER())
    assert list(attach(model, CLOVER(pairs=("qk",))).sites) == ["attn.q_proj"]


# -- models ------------------------------------------------------------------------------------------------------------


def timm_vit() -> tuple[nn.Module, Tensor]:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=2, num_heads=2, num_classes=5)
    return model, torch.randn(2, 3, 32, 32)


def dinov2() -> tuple[nn.Module, Tensor]:
    import timm

    model = timm.create_model("vit_small_patch14_dinov2", img_size=28, embed_dim=12, depth=1, num_heads=3)
    return model, torch.randn(2, 3, 28, 28)


def swin() -> tuple[nn.Module, Tensor]:
    import timm

    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(1,), num_heads=(2,)
    )
    return model, torch.randn(2, 3, 32, 32)


def beit() -> tuple[nn.Module, Tensor]:
    import timm

    model = timm.create_model("beit_base_patch16_224", img_size=32, embed_dim=12, depth=1, num_heads=2)
    return model, torch.randn(2, 3, 32, 32)


def gpt2() -> tuple[nn.Module, Tensor]:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(n_embd=12, n_head=3, n_layer=2, vocab_size=20, n_positions=8)), torch.arange(6)[None]


def bert() -> tuple[nn.Module, Tensor]:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=12, num_attention_heads=3, num_hidden_layers=1, intermediate_size=9, vocab_size=20)
    return BertModel(config), torch.arange(6)[None]


def opt() -> tuple[nn.Module, Tensor]:
    from transformers import OPTConfig, OPTModel

    config = OPTConfig(
        hidden_size=12, num_attention_heads=3, num_hidden_layers=1, ffn_dim=9, vocab_size=20, word_embed_proj_dim=12
    )
    return OPTModel(config), torch.arange(6)[None]


def bloom() -> tuple[nn.Module, Tensor]:
    from transformers import BloomConfig, BloomModel

    return BloomModel(BloomConfig(hidden_size=12, n_head=3, n_layer=1, vocab_size=20)), torch.arange(6)[None]


def t5() -> tuple[nn.Module, Tensor]:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(d_model=12, d_kv=3, num_heads=2, num_layers=1, d_ff=9, vocab_size=20)
    return T5EncoderModel(config), torch.arange(6)[None]


class MHA(nn.Module):
    def __init__(self, memory: int = 12) -> None:
        super().__init__()
        self.memory = nn.Linear(12, memory)
        self.attention = nn.MultiheadAttention(12, 3, kdim=memory, vdim=memory, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.memory(x)
        return self.attention(x, memory, memory, need_weights=False)[0]


def mha() -> tuple[nn.Module, Tensor]:
    return MHA(), torch.randn(2, 5, 12)


def mha_apart() -> tuple[nn.Module, Tensor]:
    return MHA(9), torch.randn(2, 5, 12)


def written_out() -> tuple[nn.Module, Tensor]:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x)

    return Called(), torch.randn(2, 5, 12)


def llama() -> tuple[nn.Module, Tensor]:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_hidden_layers=2,
        intermediate_size=9,
        vocab_size=20,
    )
    return LlamaModel(config), torch.arange(6)[None]


BUILDS: dict[Callable[[], tuple[nn.Module, Tensor]], list[str]] = {
    timm_vit: [f"blocks.{i}.attn.{w}" for i in range(2) for w in ("qkv[q]", "proj")],
    dinov2: ["blocks.0.attn.qkv[q]", "blocks.0.attn.proj"],
    swin: ["layers.0.blocks.0.attn.qkv[q]", "layers.0.blocks.0.attn.proj"],
    beit: ["blocks.0.attn.qkv[q]", "blocks.0.attn.proj"],
    gpt2: [f"h.{i}.attn.{w}" for i in range(2) for w in ("c_attn[q]", "c_proj")],
    bert: ["encoder.layer.0.attention.self.query", "encoder.layer.0.attention.output.dense"],
    opt: ["decoder.layers.0.self_attn.out_proj", "decoder.layers.0.self_attn.q_proj"],
    bloom: ["h.0.self_attention.query_key_value[q]", "h.0.self_attention.dense"],
    t5: ["encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.0.SelfAttention.o"],
    mha: ["attention.in_proj_weight[q]", "attention.out_proj"],
    mha_apart: ["attention.q_proj_weight", "attention.out_proj"],
    written_out: ["attn.q_proj", "attn.o_proj"],
    llama: [f"layers.{i}.self_attn.o_proj" for i in range(2)],
}
every_model = pytest.mark.parametrize("build", BUILDS, ids=lambda f: f.__name__)


def made(build: Callable[[], tuple[nn.Module, Tensor]]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = build()
    model = model.double().eval().requires_grad_(False)  # which decides the kernel of a linear layer
    with torch.no_grad():
        for p in model.parameters():  # biases start at zero, and some weights are tiny
            p.add_(0.2 * torch.randn_like(p))
    return model, x.double() if x.is_floating_point() else x


def run(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return getattr(out, "last_hidden_state", out)


@every_model
def test_start_and_names(build: Any):
    model, x = made(build)
    before = snapshot(model)
    with torch.no_grad():
        expected = run(model, x)
    adapter = attach(model, CLOVER())
    assert sorted(adapter.sites) == sorted(BUILDS[build])
    with torch.no_grad():
        assert torch.equal(run(model, x), expected)
    for site in adapter.sites.values():
        assert not site.delta().any()
        place, f = site.places[0], site.factors  # the bases span all of the weight: nothing of it is out of reach
        close((f.L @ f.C @ f.A).detach(), place.kind.to_matrix(place.module, site.weight.original))
    adapter.detach()
    assert_same(before, snapshot(model))


@every_model
def test_a_matrix_and_its_inverse_between_the_weights_of_a_pair_change_nothing(build: Any):
    """Which shows that they are a pair, that heads are where they are said to be, and that nothing stands between."""
    model, x = made(build)
    without_biases(model)
    expected = run(model, x).detach()
    kinds = {(id(w.module), w.parameter): w.kind for w in weights_of(model) if w.kind is not None}
    owners = {id(module): module for module in model.modules()}
    pairs = [(key, half) for key, half in halves(model, kinds).items() if isinstance(half, Half)]
    assert len(pairs) == len(BUILDS[build])
    for (owner, parameter, _), half in pairs:
        mine = owners[owner].get_parameter(parameter)
        other = half.partner.module.get_parameter(half.partner.parameter)
        w = half.kind.to_matrix(owners[owner], mine.detach())
        p = half.partner.kind.to_matrix(half.partner.module, other.detach())
        g = torch.eye(p.shape[-2]).double() + 0.1 * torch.randn(len(p), p.shape[-2], p.shape[-2]).double()
        inverse = torch.linalg.inv(g).repeat_interleave(len(w) // len(p), 0)
        new = inverse.mT @ w if half.pair == "qk" else w @ inverse
        with torch.no_grad():
            other.add_(half.partner.kind.from_matrix(half.partner.module, g @ p - p))
            assert differs(run(model, x), expected)
            mine.add_(half.kind.from_matrix(owners[owner], new - w))
        close(run(model, x).detach(), expected)


# -- the invariants ----------------------------------------------------------------------------------------------------


@every_model
def test_merged_folded_and_disabled(build: Any):
    model, x = made(build)
    before, base = snapshot(model), run(model, x).detach()
    adapter = attach(model, CLOVER())
    perturb(adapter)
    adapted = run(model, x).detach()
    assert differs(adapted, base)
    adapter.merge()
    close(run(model, x).detach(), adapted)
    adapter.unmerge()
    adapter.fold()
    close(run(model, x).detach(), adapted)
    adapter.unfold()
    with adapter.disabled():
        assert torch.equal(run(model, x), base)
    assert torch.equal(run(model, x), adapted)
    adapter.detach()
    assert_same(before, snapshot(model))


@every_model
def test_gradients_reach_the_cores_and_are_right(build: Any):
    """Against the base with W0 + L (C − C₀) A put in the place of its weights."""
    model, x = made(build)
    adapter = attach(model, CLOVER())
    perturb(adapter)
    weights = torch.linspace(1, 2, run(model, x).numel()).double()
    (run(model, x).flatten() * weights).sum().backward()
    named = {n for n, p in model.named_parameters() if p.grad is not None}
    assert named == {n for n, p in model.named_parameters() if p.requires_grad}
    plain, _ = made(build)
    replaced, cores = {}, []
    for site in adapter.sites.values():
        f, name, owner = site.factors, weight_of(model, site), site.places[0].module
        cores.append(f.C.detach().clone().requires_grad_())
        update = f.L.detach() @ (cores[-1] - f.C0.detach()) @ f.A.detach()
        replaced[name] = plain.get_parameter(name) + site.kind.from_matrix(owner, update)
    out = torch.func.functional_call(plain, replaced, (x,))
    loss = (getattr(out, "last_hidden_state", out).flatten() * weights).sum()
    for site, wanted in zip(adapter.sites.values(), torch.autograd.grad(loss, cores), strict=True):
        # some models compute a softmax or a norm in float32
        torch.testing.assert_close(site.factors.C.grad, wanted, rtol=1e-4, atol=1e-6)


@every_model
def test_saved_and_loaded(build: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    model, x = made(build)
    adapter = attach(model, CLOVER(), name="pairs")
    perturb(adapter)
    adapted = run(model, x).detach()
    adapter.save(tmp_path / "a")
    other, _ = made(build)
    for name in ("svd", "qr", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, None)  # nothing is decomposed at load
    loaded = load(other, tmp_path / "a")
    assert torch.equal(run(other, x), adapted)
    assert list(loaded.sites) == list(adapter.sites)
    assert [s.shape for s in loaded.sites.values()] == [s.shape for s in adapter.sites.values()]
    assert all(
        site.method == CLOVER(rank=site.shape[1:][site.kind.axis == "columns"]) for site in loaded.sites.values()
    )


def test_copies_and_pickles():
    model, x = made(written_out)
    perturb(attach(model, CLOVER()))
    adapted = run(model, x)
    assert torch.equal(run(copy.deepcopy(model), x), adapted)
    model, x = made(mha)
    perturb(attach(model, CLOVER()))
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), x), run(model, x))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("build", [timm_vit, gpt2, bert, written_out, llama], ids=lambda f: f.__name__)
def test_both_paths_agree(build: Any, dense: bool):
    model, x = made(build)
    adapter = attach(model, CLOVER())
    perturb(adapter)
    adapter.merge()
    expected = run(model, x)
    adapter.unmerge()
    for site in adapter.sites.values():
        site.dense = dense
    close(run(model, x).detach(), expected.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype):
    model, x = made(timm_vit)
    model, x = model.to(dtype), x.to(dtype)
    base = run(model, x)
    adapter = attach(model, CLOVER())
    assert torch.equal(run(model, x), base)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    perturb(adapter)
    adapted = run(model, x)
    adapter.merge()
    near_by_change(run(model, x), adapted, base, share=10 * torch.finfo(dtype).eps)


def test_compiled_and_autocast():
    torch.compiler.reset()
    model, x = made(written_out)
    adapter = attach(model, CLOVER())
    perturb(adapter)
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), run(model, x))
    model, x = model.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = run(model, x)
    with adapter.disabled():
        base = run(model, x)
    near_by_change(found, run(model, x), base, share=0.03)
    torch.compiler.reset()


def test_beside_another_method_and_per_example():
    model, x = made(timm_vit)
    base = run(model, x)
    one = attach(model, CLOVER(), name="one")
    two = attach(model, LoRA(rank=2), targets=["qkv[q,v]", "proj", "fc1"], name="two")
    perturb(one)
    perturb(two)
    with one.per_example(["two", "one"]):
        rows = run(model, x)
    with two.disabled():
        close(rows[1], run(model, x)[1])
    with one.disabled():
        close(rows[0], run(model, x)[0])
        with two.disabled():
            assert torch.equal(run(model, x), base)


def test_with_another_method_on_the_rest():
    model, x = made(gpt2)
    base = run(model, x)
    adapter = attach(model, targets={"attn.c_attn": CLOVER(), "attn.c_proj": CLOVER(), "mlp.c_fc": LoRA(rank=1)})
    assert {site.method.name for site in adapter.sites.values()} == {"clover", "lora"}
    assert torch.equal(run(model, x), base)


def test_dropout_is_the_adapters_own():
    model, x = made(written_out)
    adapter = attach(model, CLOVER(dropout=0.5))
    perturb(adapter)
    model.train()
    assert differs(run(model, x), run(model, x))


# -- what is left, and why ---------------------------------------------------------------------------------------------


def skipped(adapter: Adapter, name: str) -> str:
    return next(reason for site, reason in adapter.skipped.items() if site.endswith(name))


def test_rotary_positions():
    model, _ = made(llama)
    adapter = attach(model, CLOVER())
    assert "rotary" in skipped(adapter, "0.self_attn.q_proj")
    assert "only the query and the output projection" in skipped(adapter, "0.self_attn.k_proj")
    assert "no projection of an attention" in skipped(adapter, "mlp.up_proj")
    adapter.detach()
    with refused(model, "q_proj", "rotary"):
        attach(model, CLOVER(), targets=["q_proj"])
    with refused(model, "v_proj", "only the query"):
        attach(model, CLOVER(), targets=["v_proj"])
    with refused(model, "rotary"):
        attach(model, CLOVER(pairs=("qk",)))
    assert list(attach(model, CLOVER(), targets=["q_proj", "o_proj"][1:]).sites) == BUILDS[llama]


def test_attentions_between_whose_weights_something_stands():
    import timm

    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 12, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", **sizes, qk_norm=True)
    adapter = attach(model, CLOVER())
    assert list(adapter.sites) == ["blocks.0.attn.proj"]
    assert "q_norm normalises" in skipped(adapter, "qkv[q]")
    model = timm.create_model("vit_tiny_patch16_224", **sizes, scale_attn_norm=True)
    with refused(model, "norm normalises"):
        attach(model, CLOVER())
    sizes = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (1,), "num_heads": (2,)}
    model = timm.create_model("swinv2_tiny_window8_256", **sizes)
    with refused(model, "attn.qkv[q]: queries and keys are normalised"):
        attach(model, CLOVER())
    model = timm.create_model("eva02_tiny_patch14_224", img_size=28, embed_dim=16, depth=1, num_heads=2)
    with refused(model, "rotary"):
        attach(model, CLOVER(pairs="qk"))  # type: ignore[arg-type]


def test_attentions_of_which_too_little_is_known():
    for change, words in (
        ({"num_heads": "four", "head_dim": None}, ["how many heads"]),
        ({"num_heads": 5}, ["how many heads"]),
        ({"head_dim": 5}, ["how many heads"]),
        ({"num_heads": 12, "head_dim": 1}, None),
        ({"gate": nn.Linear(12, 12)}, ["gate may change"]),
        ({"k_norm": nn.LayerNorm(3, elementwise_affine=False)}, None),
        ({"drop": nn.Dropout(), "bias": nn.Embedding(4, 4), "q_norm": nn.Identity()}, None),
        ({"o_proj": nn.Linear(24, 13)}, None),
    ):
        model, _ = attention()
        for name, value in change.items():
            setattr(model["attn"], name, value)
        if words is not None:
            with refused(model, *words):
                attach(model, CLOVER())
            continue
        adapter = attach(model, CLOVER())
        left = {"k_norm": ["attn.o_proj"], "o_proj": ["attn.q_proj"]}.get(next(iter(change)))
        assert list(adapter.sites) == (left or ["attn.q_proj", "attn.o_proj"])
        if "o_proj" in change:
            assert "it takes 24 values, where 4 heads of 3" in adapter.skipped["attn.o_proj"]


def test_a_model_that_says_how_its_queries_are_turned():
    model, _ = attention()
    for change, word in ({"rotary_dim": 2}, "rotary"), ({"position_embedding_type": "relative_key"}, "positions"):
        model.config = SimpleNamespace(**change)  # type: ignore[assignment]
        adapter = attach(model, CLOVER())
        assert list(adapter.sites) == ["attn.o_proj"]
        assert word in adapter.skipped["attn.q_proj"]
        adapter.detach()


def test_models_without_attention():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with refused(model, "no projection of an attention"):
        attach(model, CLOVER())
    with refused(model, "no projection of an attention"):
        attach(model, CLOVER(), targets=["0"])


def test_parts_that_are_named():
    model, _ = made(timm_vit)
    with refused(model, "blocks.0.attn.qkv[k]", "only the query"):
        attach(model, CLOVER(), targets=["qkv[k]"])
    adapter = attach(model, CLOVER(), targets=["blocks.1.attn.qkv"])
    assert list(adapter.sites) == ["blocks.1.attn.qkv[q]"]
    adapter.detach()
    adapter = attach(model, CLOVER(pairs=("vo",)))
    assert "pairs" in skipped(adapter, "0.attn.qkv[q]")
    assert len(adapter.sites) == 2


def test_no_lora_can_hold_it(tmp_path: Any):
    model, _ = made(written_out)
    adapter = attach(model, CLOVER())
    with pytest.raises(ValueError, match="heads"):
        export_lora(adapter, tmp_path / "lora")
