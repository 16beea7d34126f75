"""Methods outside the equation, their papers written out in NumPy float64; and how a called layer runs them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import close, differs, equal_bits, host, near_by_change, perturb
from oracle import Array, every_shape, linear, near, output, tensors
from rows import every_called
from torch import Tensor, nn
from torch.nn import functional as F

from svdpeft import (
    BOFT,
    C3A,
    HRA,
    IA3,
    OFT,
    SORSA,
    SVFT,
    DoRA,
    ETHERPlus,
    FLoRA,
    FourierFT,
    HiRA,
    LoRA,
    PiSSA,
    RoAd,
    SHiRA,
    attach,
)
from svdpeft.adapter.adapter import Adapter
from svdpeft.methods.base import Transform
from svdpeft.registry import METHODS

LORA = {"name": "lora", "rank": 3, "alpha": 6.0}


def product(adapter: Adapter) -> Array:
    """The inner ΔW of DoRA, from its numbers: 2 L A of LORA, L A − L0 A0 of the others."""
    f = tensors(adapter)
    c, c0 = (np.diag(f[name]) if name in f else np.eye(f["L"].shape[1]) for name in ("C", "C0"))
    start = f["L0"] @ c0 @ f["A0"] if "L0" in f else 0.0
    return (1.0 if "L0" in f else 2.0) * (f["L"] @ c @ f["A"] - start)


def cayley(values: Array, b: int) -> Array:
    q = np.zeros((b, b))
    q[np.tril_indices(b, -1)] = values
    q -= q.T
    return (np.eye(b) + q) @ np.linalg.inv(np.eye(b) - q)


def block_diagonal(blocks: list[Array]) -> Array:
    n = sum(len(block) for block in blocks)
    whole, at = np.zeros((n, n)), 0
    for block in blocks:
        whole[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return whole


# -- DoRA ----------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("magnitude", ["rows", "columns"])
@pytest.mark.parametrize("inner", [LORA, PiSSA(rank=3), SORSA(rank=2)], ids=str)
def test_dora(shape: tuple[int, int], magnitude: Any, inner: Any):
    model, w, x = linear(shape)
    adapter = attach(model, DoRA(inner, magnitude=magnitude))
    axis = {"rows": 1, "columns": 0}[magnitude]
    near(tensors(adapter)["mag"], np.linalg.norm(w, axis=axis))
    perturb(adapter)
    new = w + product(adapter)
    scale = np.expand_dims(tensors(adapter)["mag"] / np.linalg.norm(new, axis=axis), axis)
    near(output(model, x), x @ (scale * new).T)
    near(adapter.delta("layer"), scale * new - w)
    m, n = shape
    own = {"lora": 3 * (m + n), "pissa": 3 * (m + n), "sorsa": 2 * (m + n + 1)}[DoRA(inner).inner.name]
    assert adapter.trainable_count == own + {"rows": m, "columns": n}[magnitude]
    assert adapter.sites["layer"].method.count(1, m, n) == adapter.trainable_count


@every_shape
def test_dora_takes_the_norm_for_a_constant(shape: tuple[int, int]):
    """The paper's gradient, section 4.3: that of mag/c · (W0 + ΔW) with the number c = ‖W0 + ΔW‖."""
    for norm_gradient in (False, True):
        model, w, x = linear(shape)
        adapter = attach(model, DoRA(LORA, norm_gradient=norm_gradient))
        perturb(adapter)
        f = tensors(adapter)
        weights = np.random.default_rng(3).standard_normal((4, shape[0]))
        (model["layer"](torch.from_numpy(x)) * torch.from_numpy(weights)).sum().backward()
        new = w + 2 * f["L"] @ f["A"]
        norm = np.linalg.norm(new, axis=1, keepdims=True)
        by_weight = weights.T @ x  # ∂loss/∂W'
        by_new = f["mag"][:, None] / norm * by_weight
        if norm_gradient:  # less what would only lengthen a row
            by_new -= (by_new * new).sum(1, keepdims=True) / norm**2 * new
        expected = {
            "mag": (by_weight * new / norm).sum(1),
            "L": 2 * by_new @ f["A"].T,
            "A": 2 * f["L"].T @ by_new,
        }
        for name, p in adapter.sites["layer"].factors.named_parameters():
            if p.requires_grad:
                near(p.grad, expected[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inner", [LoRA(rank=3), PiSSA(rank=3), SVFT()], ids=str)
@pytest.mark.parametrize("magnitude", ["rows", "columns"])
def test_dora_gain_is_one_at_the_start(dtype: torch.dtype, inner: Any, magnitude: Any):
    for scale in (1.0, 1e-3, 37.0):
        torch.manual_seed(0)
        model = nn.ModuleDict({"layer": nn.Linear(300, 70, dtype=torch.float64)})
        with torch.no_grad():
            model["layer"].weight.mul_(scale)
        model.to(dtype)
        method = DoRA(inner, magnitude=magnitude)
        site = attach(model, method).sites["layer"]
        method, w0 = site.method, site.base_matrix()
        gain = method.gain(site.factors, w0, method.inner.update(site.factors).to(w0.dtype))
        assert bool((gain == 1).all())


@torch.no_grad()
def test_dora_norm_from_the_factors_is_as_good_as_from_the_weight():
    """In float32 both are a few units in the last place off the float64 norm."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(400, 300)})
    adapter = attach(model, DoRA(PiSSA(rank=8)))
    perturb(adapter, size=0.05)
    site = adapter.sites["layer"]
    method, w0 = site.method, site.base_matrix()
    update = method.inner.update(site.factors)
    exact = torch.linalg.vector_norm(w0.double() + update.to(torch.float64).dense(), dim=-1)
    thin = site.factors.mag.double() / method.gain(site.factors, w0, update).double()
    dense = torch.linalg.vector_norm(w0 + update.dense(), dim=-1).double()
    eps = torch.finfo(torch.float32).eps
    assert float(((dense - exact) / exact).abs().max()) < 8 * eps
    assert float(((thin - exact) / exact).abs().max()) < 8 * eps


@pytest.mark.parametrize("magnitude", ["rows", "columns"])
@pytest.mark.parametrize("norm_gradient", [False, True])
def test_dora_with_a_row_and_a_column_of_zeros(magnitude: Any, norm_gradient: bool):
    model, _, x = linear((6, 9))
    with torch.no_grad():
        model["layer"].weight[2] = 0
        model["layer"].weight[:, 3] = 0
    before = output(model, x)
    adapter = attach(model, DoRA(LORA, magnitude=magnitude, norm_gradient=norm_gradient))
    np.testing.assert_array_equal(output(model, x), before)
    for _ in range(2):
        out = model["layer"](torch.from_numpy(x))
        gradients = torch.autograd.grad(out.square().sum(), list(adapter.parameters()))
        assert all(bool(g.isfinite().all()) for g in gradients)
        perturb(adapter)


def test_dora_drops_the_input_of_the_inner_update_alone():
    model, w, x = linear((6, 9))
    adapter = attach(model, DoRA({**LORA, "dropout": 0.5}))
    perturb(adapter)
    site = adapter.sites["layer"]
    f, new = tensors(adapter), w + product(adapter)
    gain = f["mag"] / np.linalg.norm(new, axis=1)
    model.train()
    torch.manual_seed(3)
    found = output(model, x)
    torch.manual_seed(3)
    dropped = F.dropout(torch.from_numpy(x), 0.5).numpy()
    near(found, gain * (x @ w.T + dropped @ product(adapter).T))
    model.eval()
    near(output(model, x), gain * (x @ new.T))
    assert site.method.dropout == 0.5


@pytest.mark.parametrize("inner", [SVFT(reference_init=True), METHODS["kasa"](rank=2)], ids=str)
def test_dora_starts_where_its_inner_method_does(inner: Any):
    model, _, x = linear((6, 9))
    attach(model, inner, name="alone")
    expected = output(model, x)
    model, w, _ = linear((6, 9))
    adapter = attach(model, DoRA(inner))
    near(output(model, x), expected)
    assert not adapter.sites["layer"].method.exact_start
    assert differs(torch.from_numpy(expected), torch.from_numpy(x @ w.T))


def test_dora_passes_on_what_its_inner_method_does():
    sorsa = SORSA(rank={"a": 1, ".*": 2}, gamma=0.5)
    for method in (sorsa, DoRA(sorsa)):
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(5, 4, dtype=torch.float64) for name in "ab"})
        adapter = attach(model, method)
        perturb(adapter)
        if method is sorsa:
            plain = adapter
    assert [site.factors.L.shape[-1] for site in adapter.sites.values()] == [1, 2]
    with torch.no_grad():
        for name, site in adapter.sites.items():
            for role in "LCA":
                getattr(site.factors, role).copy_(getattr(plain.sites[name].factors, role))
    for each in (plain, adapter):
        each.after_step(lr_scale=0.7)
    for name, site in adapter.sites.items():
        for role in "LCA":
            assert equal_bits(getattr(site.factors, role), getattr(plain.sites[name].factors, role))
    assert attach(nn.ModuleDict({"a": nn.Linear(5, 4)}), DoRA(SORSA(rank=2, mode="loss"))).penalty() is not None
    assert DoRA(SORSA(mode="gradient")).changes_gradients
    assert DoRA(METHODS["eva"]()).needs == "inputs"


def test_dora_of_vera_shares_what_vera_shares():
    model = nn.ModuleDict({name: nn.Linear(5, 4) for name in "ab"})
    adapter = attach(model, DoRA(METHODS["vera"](rank=3)))
    a, b = (adapter.sites[name].factors for name in "ab")
    assert a.tied
    assert all(getattr(a, name) is getattr(b, name) for name in a.tied)
    assert a.mag is not b.mag


def test_dora_is_given_a_method_a_name_or_a_mapping():
    assert DoRA() == DoRA(LoRA()) == DoRA("lora") == DoRA({"name": "lora"})
    assert DoRA({"name": "pissa", "rank": 16}).inner == PiSSA(rank=16)
    for inner, words in (
        (OFT(), "product of thin factors"),
        (DoRA(), "product of thin factors"),
        (METHODS["full"](), "product of thin factors"),
        ("sorza", "did you mean 'sorsa'"),
        ({"rank": 3}, "lacks 'name'"),
    ):
        with pytest.raises(ValueError, match=words):
            DoRA(inner)
    with pytest.raises(ValueError, match="rows, columns"):
        DoRA(magnitude="row")  # type: ignore[arg-type]


# -- OFT -----------------------------------------------------------------------------------------------------

EVEN = [(6, 9, 3), (9, 6, 2), (7, 8, 4), (5, 7, 7)]  # m, n, b


@pytest.mark.parametrize(("m", "n", "b"), EVEN)
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("neumann", [None, 1, 3])
def test_oft(m: int, n: int, b: int, share: bool, neumann: int | None):
    model, w, x = linear((m, n))
    adapter = attach(model, OFT(block_size=b, block_share=share, neumann=neumann))
    assert not tensors(adapter)["Q"].any()
    perturb(adapter)
    values = tensors(adapter)["Q"]
    assert values.shape == (1 if share else n // b, b * (b - 1) // 2)
    blocks = []
    for i in range(n // b):
        r = cayley(values[0 if share else i], b)
        if neumann is not None:
            q = np.linalg.solve((r + np.eye(b)).T, (r - np.eye(b)).T).T  # back from R: Q = (R − I)(R + I)⁻¹
            r = (np.eye(b) + q) @ sum(np.linalg.matrix_power(q, k) for k in range(neumann + 1))
        blocks.append(r)
    new = w @ block_diagonal(blocks)
    near(output(model, x), x @ new.T)
    near(adapter.delta("layer"), new - w)
    assert adapter.trainable_count == (b * (b - 1) // 2 if share else n * (b - 1) // 2)
    if neumann is None:  # the geometry of W0 is kept
        near(np.linalg.norm(new, axis=1), np.linalg.norm(w, axis=1))
        near(np.linalg.svd(new, compute_uv=False), np.linalg.svd(w, compute_uv=False))


@pytest.mark.parametrize("share", [False, True])
def test_coft_projects_each_rotation(share: bool):
    model, _, _ = linear((6, 9))
    adapter = attach(model, OFT(block_size=3, block_share=share, eps=0.2))
    adapter.after_step()
    assert not tensors(adapter)["Q"].any()
    perturb(adapter)
    with torch.no_grad():
        adapter.sites["layer"].factors.Q[0] *= 1e-3 if not share else 1.0
    before = tensors(adapter)["Q"]
    adapter.after_step()
    limit = 0.2 / math.sqrt(len(before))
    size = np.sqrt(2) * np.linalg.norm(before, axis=1, keepdims=True)
    assert (size > limit).any()
    assert share or (size < limit).any()
    near(tensors(adapter)["Q"], np.where(size > limit, before * limit / size, before))
    free = attach(linear((6, 9))[0], OFT(block_size=3))
    perturb(free)
    values = tensors(free)["Q"]
    free.after_step()
    np.testing.assert_array_equal(tensors(free)["Q"], values)


def test_block_sizes_that_do_not_fit():
    model, _, _ = linear((6, 90))
    for method in (OFT(block_size=32), BOFT(block_size=32)):
        with pytest.raises(ValueError, match=r"block_size 32 does not divide the 90 inputs of layer: 30 and 45 would"):
            attach(model, method)
        assert attach(model, method, clip_rank=True, name=method.name).sites["layer"].method.block_size == 30
    with pytest.raises(ValueError, match="1 input: there is nothing to rotate"):
        attach(linear((6, 1))[0], OFT(), clip_rank=True)
    assert attach(linear((6, 11))[0], OFT(block_size=4), clip_rank=True).sites["layer"].method.block_size == 11
    for options, words in (({"block_size": 1}, "below 2"), ({"eps": 0.0}, "not positive"), ({"neumann": 0}, "outside")):
        with pytest.raises(ValueError, match=words):
            OFT(**options)


# -- BOFT ----------------------------------------------------------------------------------------------------


def butterfly(values: Array, n: int, b: int, stride: int) -> Array:
    """One factor as an n×n matrix: each block acts on two half-blocks that are ``stride`` half-blocks apart."""
    whole, half, at = np.zeros((n, n)), b // 2, 0
    for first in range(n // half):
        if (first // stride) % 2:
            continue  # the second of a pair
        where = [p * half + i for p in (first, first + stride) for i in range(half)]
        whole[np.ix_(where, where)] = cayley(values[at], b)
        at += 1
    assert at == n // b
    return whole


@pytest.mark.parametrize(
    ("m", "n", "b", "factors"), [(6, 9, 3, 1), (9, 6, 2, 1), (9, 8, 2, 2), (5, 16, 4, 3), (7, 24, 6, 3), (6, 16, 2, 4)]
)
def test_boft(m: int, n: int, b: int, factors: int):
    model, w, x = linear((m, n))
    adapter = attach(model, BOFT(block_size=b, butterflies=factors))
    f = tensors(adapter)
    assert not f["Q"].any()
    assert (f["s"] == 1).all()
    perturb(adapter)
    f = tensors(adapter)
    rotation = np.eye(n)
    for j in range(factors):
        if b % 2:
            rotation = rotation @ block_diagonal([cayley(v, b) for v in f["Q"][j]])
        else:
            rotation = rotation @ butterfly(f["Q"][j], n, b, 2**j)
    new = f["s"][:, None] * (w @ rotation)
    near(output(model, x), x @ new.T)
    near(adapter.delta("layer"), new - w)
    near(rotation @ rotation.T, np.eye(n))
    reach = b * 2 ** (factors - 1) if b % 2 == 0 else b
    assert ((np.abs(rotation) > 1e-9).sum(0) == reach).all()
    assert adapter.trainable_count == factors * n * (b - 1) // 2 + m


def test_butterflies_that_do_not_fit():
    model, _, _ = linear((6, 12))
    with pytest.raises(ValueError, match=r"butterflies 3 at layer: 4 · 2\^2 does not divide its 12 inputs; at most 1"):
        attach(model, BOFT(block_size=4, butterflies=3))
    method = attach(model, BOFT(block_size=2, butterflies=3), clip_rank=True).sites["layer"].method
    assert (method.block_size, method.butterflies) == (2, 2)
    with pytest.raises(ValueError, match="block_size 3 is odd"):
        BOFT(block_size=3, butterflies=2)
    with pytest.raises(ValueError, match="butterflies 0"):
        BOFT(butterflies=0)


# -- dropout of blocks -----------------------------------------------------------------------------------------

LEFT_OUT = [OFT(3, dropout=0.4), OFT(3, block_share=True, dropout=0.4), OFT(3, neumann=2, dropout=0.4)]
LEFT_OUT += [BOFT(2, butterflies=2, dropout=0.4)]


@pytest.mark.parametrize("layer_type", ["linear", "convolution"])
@pytest.mark.parametrize("method", LEFT_OUT, ids=str)
def test_a_training_forward_leaves_blocks_out(method: OFT | BOFT, layer_type: str):
    """Each is one of the forwards with some blocks at rest, all of these come, about as often as they should."""
    n = 9 if isinstance(method, OFT) else 8
    if layer_type == "linear":
        layer, x = nn.Linear(n, 5, dtype=torch.float64), torch.randn(4, n, dtype=torch.float64)
    else:
        layer, x = nn.Conv1d(1, 5, n, dtype=torch.float64), torch.randn(2, 1, n + 2, dtype=torch.float64)
    model = nn.Sequential(layer).train()
    adapter = attach(model, method)
    perturb(adapter)
    site = adapter.sites["0"]
    q = site.factors.Q.detach().clone()
    blocks = (*q.shape[:-2], 3, 1) if isinstance(method, OFT) else (*q.shape[:-1], 1)  # of a convolution a batch of one
    twin = nn.Sequential(
        layer.__class__(*((n, 5) if layer_type == "linear" else (1, 5, n)), dtype=torch.float64)
    ).eval()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "svdpeft" not in k})
    apart = {"block_share": False} if isinstance(method, OFT) else {}
    plain = attach(twin, dataclasses.replace(method, dropout=0.0, **apart))
    known = []
    count = math.prod(blocks)
    for bits in itertools.product((0.0, 1.0), repeat=count):
        with torch.no_grad():
            plain.sites["0"].factors.Q.copy_(q * torch.tensor(bits).view(blocks))
            if "s" in dict(site.factors.named_parameters()):
                plain.sites["0"].factors.s.copy_(site.factors.s)
            known.append((sum(bits), twin(x)))
    seen, kept, draws = set(), 0.0, 400
    with torch.no_grad():
        for _ in range(draws):
            y = model(x)
            at = min(range(len(known)), key=lambda i: float((known[i][1] - y).abs().max()))
            close(y, known[at][1])
            seen.add(at)
            kept += known[at][0]
    assert len(seen) == len(known) if count < 4 else len(seen) > 60
    assert abs(kept / (draws * count) - 0.6) < 4 * math.sqrt(0.24 / (draws * count))
    model.eval()
    close(model(x), known[-1][1])
    assert torch.equal(model(x), model(x))


def test_what_is_left_out_gets_no_gradient():
    model = nn.Sequential(nn.Linear(9, 5)).train()
    adapter = attach(model, OFT(3, dropout=0.5))
    perturb(adapter)
    for _ in range(40):
        model(torch.randn(4, 9)).square().sum().backward()
        grad = adapter.sites["0"].factors.Q.grad.abs().sum(-1)
        if 0 < (grad == 0).sum() < 3:
            return
        adapter.sites["0"].factors.Q.grad = None
    pytest.fail("no forward left out some of the blocks")


def test_dropout_of_blocks_is_compiled_and_refused_where_a_weight_is_read():
    model = nn.Sequential(nn.Linear(8, 8)).train()
    perturb(attach(model, BOFT(2, butterflies=2, dropout=0.5)))
    x = torch.randn(4, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert not torch.equal(compiled(x), compiled(x))
    torch.compiler.reset()
    with pytest.raises(ValueError, match=r"dropout 0\.5 at in_proj_weight"):
        attach(nn.MultiheadAttention(8, 2), OFT(4, dropout=0.5), ["in_proj_weight"])
    with pytest.raises(ValueError, match="outside"):
        OFT(dropout=1.0)


# -- FLoRA ---------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_flora(shape: tuple[int, int], rank: int):
    model, w, x = linear(shape)
    adapter = attach(model, FLoRA(rank=rank))
    f = tensors(adapter)
    np.testing.assert_array_equal(f["L"] @ f["A"], np.ones(shape))
    perturb(adapter)
    f = tensors(adapter)
    near(output(model, x), x @ (w * (f["L"] @ f["A"])).T)
    # the paper's form, with one (a_j, b_j) per term
    near(output(model, x), sum(f["L"][:, j] * ((f["A"][j] * x) @ w.T) for j in range(rank)))
    assert adapter.trainable_count == rank * sum(shape)
    with pytest.raises(ValueError, match="rank 0 is below 1"):
        FLoRA(rank=0)
    with pytest.raises(ValueError, match="rank 40"):
        attach(linear(shape)[0], FLoRA(rank=40))


# -- how a called layer runs them ----------------------------------------------------------------------------

METHODS_HERE: list[Transform] = [
    DoRA({"name": "pissa", "rank": 2}),
    DoRA({"name": "sorsa", "rank": 2}, magnitude="columns", norm_gradient=True),
    OFT(block_size=3),
    BOFT(block_size=2, butterflies=2),
    FLoRA(rank=2),
    HiRA(rank=2),
    IA3(),
    IA3(side="input"),
    HRA(rank=4),
    RoAd(4),
    FourierFT(5),
    SHiRA(rank=1),
    C3A(3),
    ETHERPlus(2),
]
every_transform = pytest.mark.parametrize("method", METHODS_HERE, ids=str)


@every_called
@every_transform
def test_gradients_of_the_fast_path_are_those_of_the_dense_one(method: Transform, kind: tuple[str, int]):
    model, x = host(kind)
    adapter = attach(model, method, ["layer"], clip_rank=True)
    perturb(adapter)
    site, found = adapter.sites["layer"], []
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    for dense in (site.dense, True):
        site.dense = dense
        out = model.layer(x)
        found.append([out, *torch.autograd.grad(out.sin().sum(), [*inputs, *adapter.parameters()])])
    for fast, slow in zip(*found, strict=True):
        close(fast, slow)


@pytest.mark.parametrize("method", [method for method in METHODS_HERE if not isinstance(method, SHiRA)], ids=str)
def test_no_dense_change_is_built_on_a_linear_layer(method: Transform, monkeypatch: pytest.MonkeyPatch):
    model, x = host(("linear", 1))
    adapter = attach(model, method, ["layer"], clip_rank=True)
    perturb(adapter)
    expected = model(x)

    def never(*args: Any) -> Tensor:
        raise AssertionError("ΔW was built")

    monkeypatch.setattr(type(method), "delta", never)
    close(model(x), expected)
    shape, seen = adapter.sites["layer"].shape[1:], []

    def saved(t: Tensor) -> Tensor:
        if t.shape[-2:] == shape and not any(t is p or t._base is p for p in model.parameters()):
            seen.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t):
        model(x)
    assert not [t for t in seen if t.data_ptr() not in {p.data_ptr() for p in model.parameters()}]


ORDERS: dict[str, Callable[[], list[Any]]] = {
    "first": lambda: [DoRA(LORA), LoRA(rank=1), OFT(block_size=3)],
    "after one that adds in place": lambda: [LoRA(rank=1), DoRA(LORA), BOFT(block_size=3), FLoRA()],
    "twice": lambda: [DoRA(LORA), DoRA({"name": "pissa", "rank": 2})],
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("state", [None, "merge", "fold"])
def test_several_adapters_add_up_whoever_comes_first(order: str, state: str | None, bias: bool):
    torch.manual_seed(0)
    layer = nn.Linear(9, 6, bias=bias, dtype=torch.float64)
    w, x = layer.weight.detach().clone(), torch.randn(4, 9, dtype=torch.float64)
    model = nn.ModuleDict({"layer": layer})
    adapters = [attach(model, method, name=str(i)) for i, method in enumerate(ORDERS[order]())]
    for adapter in adapters:
        perturb(adapter)
    total = w + sum(adapter.delta("layer") for adapter in adapters)
    expected = F.linear(x, total, layer.bias)
    close(layer(x).detach(), expected.detach())
    parameters = [p for adapter in adapters for p in adapter.parameters()]
    fast = torch.autograd.grad(layer(x).sin().sum(), parameters)
    for adapter in adapters:
        adapter.sites["layer"].dense = True
    slow = torch.autograd.grad(layer(x).sin().sum(), parameters)
    for one, other in zip(fast, slow, strict=True):
        close(one, other)
    for adapter in adapters:
        adapter.sites["layer"].dense = False
    for adapter in adapters if state else []:
        getattr(adapter, state or "")()
        close(layer(x).detach(), expected.detach())


@every_transform
def test_part_of_a_fused_layer(method: Transform):
    torch.manual_seed(0)
    qkv = nn.Linear(6, 18, dtype=torch.float64)
    model = nn.ModuleDict({"qkv": qkv})
    x, before = torch.randn(4, 6, dtype=torch.float64), qkv.weight.detach().clone()
    adapter = attach(model, method, ["qkv[q,v]"], clip_rank=True)
    perturb(adapter)
    total = before + sum(site.delta() for site in adapter.sites.values())
    assert torch.equal(total[6:12], before[6:12])
    close(qkv(x).detach(), F.linear(x, total, qkv.bias).detach())
    assert all(site.dense == (not method.acts(True)) for site in adapter.sites.values())
    for site in adapter.sites.values():
        assert differs(site.delta(), torch.zeros(()))


def test_tied_weight_of_an_embedding_and_a_head():
    for method in METHODS_HERE:
        torch.manual_seed(0)
        model = nn.ModuleDict({"wte": nn.Embedding(11, 6), "head": nn.Linear(6, 11, bias=False)}).double()
        model["head"].weight = model["wte"].weight
        ids, before = torch.tensor([[1, 3], [10, 0]]), model["wte"].weight.detach().clone()
        adapter = attach(model, method, ["wte", "head"], clip_rank=True)
        perturb(adapter)
        (site,) = adapter.sites.values()
        new = before + site.delta()
        close(model["wte"](ids).detach(), new[ids])
        x = torch.randn(3, 6, dtype=torch.float64)
        close(model["head"](x).detach(), x @ new.mT)


def test_size_of_a_transposed_convolution_is_up_to_the_caller():
    for method in METHODS_HERE:
        torch.manual_seed(0)
        layer = nn.ConvTranspose2d(6, 4, 3, stride=2, dtype=torch.float64)
        x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
        adapter = attach(nn.ModuleDict({"layer": layer}), method, "all", clip_rank=True)
        perturb(adapter)
        found = layer(x, output_size=(10, 12))
        adapter.merge(permanent=True)
        close(found.detach(), layer(x, output_size=(10, 12)).detach())


@every_transform
def test_a_model_in_half_precision_after_attaching(method: Transform):
    """The numbers of a method may be in the weight's dtype, which no solver takes."""
    model, x = host(("linear", 1), dtype=torch.float32)
    base = model.layer(x)
    adapter = attach(model, method, ["layer"], clip_rank=True)
    perturb(adapter)
    expected = model.layer(x)
    model.to(torch.bfloat16)
    near_by_change(model.layer(x.bfloat16()), expected, base, share=0.03)
    read = operator.attrgetter("layer.weight")(model)
    near_by_change(F.linear(x, read.float()), expected, base, share=0.03)


def test_dora_where_the_update_takes_nearly_all_of_a_row_away():
    """In float32 the norm of what is left is rounding: the gain stays finite, and is not that of a row of zeros."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(64, 64, bias=False)})
    adapter = attach(model, DoRA(PiSSA(rank=64)), ["layer"])
    site = adapter.sites["layer"]
    with torch.no_grad():
        site.factors.A.mul_(1e-2)  # W' = mag · direction of a hundredth of W0
    w = site.matrix() + site.base_matrix()
    torch.testing.assert_close(w.norm(dim=1), site.factors.mag, rtol=1e-2, atol=0)
    with torch.no_grad():
        site.factors.A.zero_()
    assert bool(site.matrix().isfinite().all())
