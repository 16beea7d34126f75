"""VeRA, TinyLoRA, RandLoRA, AdaMSS and FRoD against Hugging Face PEFT, on the same weights; what differs is named."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import svdpeft
from svdpeft.methods import adamss
from svdpeft.methods.base import Given

peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


class Block(nn.Module):
    def __init__(self, m: int, n: int, bias: bool) -> None:
        super().__init__()
        self.q = nn.Linear(n, m, bias=bias)
        self.p = nn.Linear(m, n, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.p(torch.tanh(self.q(x)))


def net(m: int = 9, n: int = 6, bias: bool = True, depth: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(m, n, bias) for _ in range(depth)))


def both(config: Any, method: svdpeft.Method, base: nn.Module) -> tuple[nn.Module, nn.Module, Any]:
    """The same model with their adapter and with ours, both at the base's output."""
    x = torch.randn(4, next(base.parameters()).shape[1])
    expected = base(x)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    adapter = svdpeft.attach(base, method, ["q", "p"])
    torch.testing.assert_close(base(x), expected, rtol=0, atol=0)
    return theirs, base, adapter


def layer(theirs: nn.Module, site: str) -> Any:
    return theirs.base_model.model.get_submodule(site)


def same(theirs: nn.Module, ours: nn.Module, width: int = 6, **tolerance: float) -> None:
    x = torch.randn(7, width)
    torch.testing.assert_close(ours(x), theirs(x), **tolerance)


def move(target: Tensor, source: Tensor) -> None:
    """Give both sides the same new values."""
    with torch.no_grad():
        source.copy_(torch.randn_like(source, dtype=torch.float32))
        target.copy_(source.reshape(target.shape))


def signs(a: Tensor, b: Tensor) -> Tensor:
    """The sign of each column of b against the same column of a, which must be equal up to that."""
    sign = torch.sign((a * b).sum(0))
    torch.testing.assert_close(a, b * sign, rtol=1e-3, atol=1e-4)
    return sign


def test_vera():
    theirs, ours, adapter = both(peft.VeraConfig(r=5, target_modules=["q", "p"]), svdpeft.VeRA(rank=5), net())
    a, b = (getattr(theirs.base_model, name)["default"] for name in ("vera_A", "vera_B"))
    f = adapter.sites["0.q"].factors
    assert (f.A.shape, f.B.shape) == (a.shape, b.shape) == ((5, 9), (9, 5))  # for the largest layer
    for mine, other, fan in ((f.A, a, 9), (f.B, b, 5)):
        assert max(mine.abs().max(), other.abs().max()) <= math.sqrt(6 / fan)
        # The numbers differ: theirs are float32 from projection_prng_key, A before B from one stream; ours are float64
        # from the seed of the attachment, each from its own stream.
        assert not torch.equal(mine, other)
        mine.data.copy_(other)
    for name, site in adapter.sites.items():
        other = layer(theirs, name)
        torch.testing.assert_close(site.factors.b, other.vera_lambda_b["default"])
        torch.testing.assert_close(site.factors.d, other.vera_lambda_d["default"])
        move(site.factors.b.data, other.vera_lambda_b["default"])
        move(site.factors.d.data, other.vera_lambda_d["default"])
    same(theirs, ours)
    assert adapter.trainable_count == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


@pytest.mark.parametrize(("tying", "tie", "groups"), [(0.0, 1, 4), (0.5, 2, 2), (1.0, "all", 1)])
def test_tinylora(tying: float, tie: Any, groups: int):
    config = peft.TinyLoraConfig(r=3, u=4, weight_tying=tying, target_modules=["q", "p"])
    method = svdpeft.TinyLoRA(rank=3, u=4, tie=tie, split="both")  # PEFT: √Σ on either side; the paper: UΣ
    theirs, ours, adapter = both(config, method, net())
    vectors = theirs.base_model.tinylora_v["default"]
    assert len(vectors) == groups
    assert adapter.trainable_count == groups * 4 == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    for name, site in adapter.sites.items():
        other, f = layer(theirs, name), site.factors
        turn = signs(f.L.detach(), other.tinylora_B["default"])
        torch.testing.assert_close(f.A * turn[:, None], other.tinylora_A["default"], rtol=1e-3, atol=1e-4)
        p = other.tinylora_P["default"]  # N(0, 1/r) as ours, from seed 42 + the number of the layer
        assert p.shape == f.P.shape
        f.P.data.copy_(turn[:, None] * p * turn)
    for v, p in zip(dict(adapter.named_parameters()).values(), vectors.values(), strict=True):
        assert bool((v == 0).all())
        assert bool((p == 0).all())
        move(v.data, p)
    same(theirs, ours)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (8, 8)], ids=str)
@pytest.mark.parametrize("rank", [2, 4])
def test_randlora(shape: tuple[int, int], rank: int):
    config = peft.RandLoraConfig(r=rank, randlora_alpha=2.5, target_modules=["q", "p"])
    theirs, ours, adapter = both(config, svdpeft.RandLoRA(rank=rank, alpha=2.5, gamma="peft"), net(*shape))
    a, b = (getattr(theirs.base_model, name)["default"].float() for name in ("randlora_A", "randlora_B"))
    f = adapter.sites["0.q"].factors
    bases = math.ceil(min(shape) / rank)
    # They allocate for the largest m and the largest n of any layer, ours for the largest min(m, n) and max(m, n).
    assert (a.shape, b.shape) == ((rank, 1, max(shape)), (max(shape), math.ceil(max(shape) / rank), rank))
    assert (f.A.shape, f.B.shape) == ((rank, min(shape)), (max(shape), bases, rank))
    # They divide by the measured deviation, ours have variance one in distribution.
    assert abs(float(a.std()) - 1) < 0.02
    # They flatten B as (base, rank) and Λ A Γ as (rank, base), so that column k·bases + i of the flat B, and not the
    # paper's column k of B_i, meets Λ_i,k. The columns are random alike: it is the same method with B in another order.
    f.A.data.copy_(a[:, 0, : min(shape)])
    f.B.data.copy_(b[:, :bases].flatten(1).unflatten(1, (rank, bases)).mT)
    for buffers in (theirs.base_model.randlora_A, theirs.base_model.randlora_B):  # drawn in 16 bits there
        buffers["default"] = buffers["default"].float()
    for name, site in adapter.sites.items():
        other = layer(theirs, name)
        torch.testing.assert_close(site.factors.Lambda.mT, other.randlora_lambda["default"])
        torch.testing.assert_close(site.factors.Gamma, other.randlora_gamma["default"])
        with torch.no_grad():
            for mine, parameter in (
                (site.factors.Lambda.mT, other.randlora_lambda["default"]),
                (site.factors.Gamma, other.randlora_gamma["default"]),
            ):
                parameter.normal_()
                mine.copy_(parameter)
    same(theirs, ours, shape[1], rtol=1e-4, atol=1e-4)
    assert adapter.trainable_count == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_randlora_gamma_of_the_paper_is_the_constructors():
    config = peft.RandLoraConfig(r=2, init_weights=False, target_modules=["q", "p"])
    theirs = peft.get_peft_model(net(), config)
    f = svdpeft.attach(net(), svdpeft.RandLoRA(rank=2)).sites["0.q"].factors
    torch.testing.assert_close(f.Gamma, layer(theirs, "0.q").randlora_gamma["default"])


@pytest.mark.parametrize("width", [2, 6])
def test_adamss(width: int, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("sklearn", reason="PEFT clusters with scikit-learn")
    base = nn.Sequential(nn.Linear(6, 90, bias=False))  # with a bias PEFT adapts that too: not offered here
    config = peft.AdamssConfig(r=6, num_subspaces=3, subspace_rank=width, target_modules=["0"])
    x, theirs = torch.randn(4, 6), peft.get_peft_model(copy.deepcopy(base), config)
    other = layer(theirs, "0")
    clusters = other.seg_result["default"]
    # Same clusters: their k-means is scikit-learn's from a fixed seed, ours another, and both depend on the start.
    label = torch.empty(90, dtype=torch.long)
    for k, rows in clusters.items():
        label[rows] = k
    monkeypatch.setattr(adamss, "kmeans", lambda *args: label)
    method = svdpeft.AdaMSS(rank=6, clusters=3, cluster_rank=width)
    adapter = svdpeft.attach(base, method, ["0"])
    f = adapter.sites["0"].factors
    # Their SVD is a randomized one; at full rank that is exact.
    turn = signs(f.V.detach().mT, other.adamss_newB["default"].mT)
    f.V.data.copy_(other.adamss_newB["default"] * turn[:, None])
    for k, rows in clusters.items():
        a, b = (getattr(other, name)["default"][k] for name in ("adamss_A", "adamss_B"))
        assert len(rows) >= width
        mine = f.A[width * k : width * (k + 1)]
        if width == 6:  # below, their directions of a cluster are a randomized estimate without spare columns
            signs((mine * turn).detach().mT, a.detach().mT)
        else:
            assert float((mine * turn * a).sum(-1)[0].abs()) > 0.99
        assert bool((b == 0).all())
        with torch.no_grad():
            a.normal_()
            b.normal_()
            mine.copy_(a * turn)
            f.B[rows] = b
    torch.testing.assert_close(base(x), theirs(x), rtol=1e-4, atol=1e-4)
    # Equal counts, as long as no cluster has fewer rows than the rank: then theirs is smaller.
    assert adapter.trainable_count == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_frod():
    config = peft.FrodConfig(target_modules=["q", "p"], sparse_rate=0.2, progressbar=False)
    base = net(9, 6, depth=3)
    x, expected = torch.randn(4, 6), base(torch.zeros(1, 6))
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    adapter = svdpeft.attach(base, svdpeft.FRoD(density=0.2), ["q", "p"])
    # Ours starts at the base bit for bit; theirs puts U diag(λ) Vᵀ in the place of the weight.
    assert torch.equal(base(torch.zeros(1, 6)), expected)
    torch.testing.assert_close(theirs(x), base(x), rtol=1e-3, atol=1e-3)
    assert adapter.trainable_count == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    for name, site in adapter.sites.items():
        other, f = layer(theirs, name), site.factors
        v = other.frod_V["default"]
        turn = signs(f.V.detach(), v)
        torch.testing.assert_close(f.L * turn, other.frod_U["default"], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(f.C, other.frod_lambda_l["default"], rtol=1e-3, atol=1e-4)
        i, j = other.frod_s_indices["default"]
        n = v.shape[0]
        assert len(i) == f.index.numel() == int(0.2 * n * n)
        assert bool((i != j).all())
        values, shift = torch.randn(len(i)), torch.randn(n)
        with torch.no_grad():
            other.frod_lambda_s_values["default"].copy_(values)
            other.frod_lambda_l["default"] += shift
            f.index.copy_(i * n + j)  # the positions are drawn otherwise; one tensor for all blocks of a type
            f.S.copy_(values * turn[i] * turn[j])
            f.C += shift
    same(theirs, base, rtol=1e-3, atol=2e-3)


def test_frod_types_of_modules_are_those_of_peft():
    from peft.tuners.frod.model import _category_from_key

    names = [
        f"{stack}.layers.{i}.{module}"
        for stack in ("encoder", "decoder")
        for i in range(2)
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.fc1")
    ]
    ours: dict[str, set[str]] = {}
    theirs: dict[str, set[str]] = {}
    for name in names:
        ours.setdefault(Given(name, (1, 2, 2), 0, Tensor).module_type(2), set()).add(name)
        theirs.setdefault(_category_from_key(name), set()).add(name)
    assert sorted(map(sorted, ours.values())) == sorted(map(sorted, theirs.values()))
