"""Defects that were reproduced in other libraries and must not exist here: one test each."""

import copy

import pytest
import torch
from helpers import close
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import svdpeft


def perturb(adapter, size=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p))


def test_pissa_leaves_the_base_alone_so_disabling_and_a_second_adapter_work():
    model, x = nn.Sequential(nn.Linear(12, 9)), torch.randn(4, 12)
    base = model(x)
    first = svdpeft.attach(model, svdpeft.PiSSA(rank=4))
    perturb(first)
    with first.disabled():
        assert torch.equal(model(x), base)
        second = svdpeft.attach(model, svdpeft.LoRA(rank=2), name="second")
        assert torch.equal(model(x), base)
        assert torch.equal(second.sites["0"].weight.original, model[0].weight)


def test_a_fast_svd_adapter_reloads_to_the_same_bits_under_another_seed(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(80, 70)), torch.randn(3, 80)
    adapter = svdpeft.attach(model, svdpeft.PiSSA(rank=4, driver="randomized"), seed=1)
    perturb(adapter)
    expected = model(x)
    adapter.save(tmp_path / "a")
    adapter.detach()
    torch.manual_seed(12345)
    svdpeft.load(model, tmp_path / "a")
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("method", [svdpeft.PiSSA(rank=3), svdpeft.SORSA(rank=3), svdpeft.SVFT()], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"groups": 2}, {"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}, {"stride": (2, 1), "groups": 4}],
    ids=str,
)
def test_svd_methods_adapt_and_merge_convolutions(method, options):
    model, x = nn.Sequential(nn.Conv2d(8, 12, (3, 2), **options).double()), torch.randn(2, 8, 9, 7).double()
    base = model(x)
    adapter = svdpeft.attach(model, method, "all")
    assert torch.equal(model(x), base)
    perturb(adapter)
    adapted = model(x)
    assert (adapted - base).abs().max() > 1e-3
    adapter.merge()
    torch.testing.assert_close(model(x), adapted, rtol=1e-10, atol=1e-12)


def test_the_out_projection_of_attention_is_merged_once():
    attention = nn.MultiheadAttention(8, 2).double()
    x, before = torch.randn(3, 2, 8).double(), attention.out_proj.weight.detach().clone()
    adapter = svdpeft.attach(attention, svdpeft.PiSSA(rank=2), ["out_proj"])
    perturb(adapter)
    adapted = attention(x, x, x)[0]
    adapter.merge()
    close(attention(x, x, x)[0], adapted)
    close(attention.out_proj.weight.detach(), before + adapter.delta("out_proj"))


def test_a_tied_head_never_corrupts_the_embedding():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.body(self.embed(ids)))

    model, ids = Tied(), torch.arange(5)
    base = model(ids)
    adapter = svdpeft.attach(model, svdpeft.PiSSA(rank=2))
    assert list(adapter.sites) == ["body"]
    assert torch.equal(model(ids), base)
    assert model.head.weight is model.embed.weight
    alone = svdpeft.attach(Tied(), svdpeft.PiSSA(rank=2), ["head"])
    with pytest.raises(ValueError, match="head cannot be merged: embed has the same weight and is not adapted"):
        alone.merge()


def test_a_hundred_merges_in_bfloat16_change_no_bit():
    model = nn.Sequential(nn.Linear(33, 21)).bfloat16()
    before = copy.deepcopy(model.state_dict())
    adapter = svdpeft.attach(model, svdpeft.SORSA(rank=4))
    perturb(adapter)
    for _ in range(100):
        adapter.merge()
        adapter.unmerge()
    adapter.detach()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_merge_in_bfloat16_says_how_much_of_a_small_update_it_lost():
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=4))
    perturb(adapter, 1e-3)
    weight, delta = model[0]._parameters["weight"].detach().float(), adapter.delta("0")
    report = adapter.merge()
    lost = (model[0].weight.float() - (weight + delta)).norm() / delta.norm()
    assert report.lost["0"] == pytest.approx(lost.item(), rel=1e-4)
    assert lost > 0.1, "the case is meant to be a bad one"
    assert f"{report.worst:.2%} at 0" in str(report)


VIEWS = {
    torch.ops.aten.t.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.view.default,
    torch.ops.aten.detach.default,
}


class Shapes(TorchDispatchMode):
    """Note the shape of everything that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func not in VIEWS:  # F.linear transposes the weight without copying it
            self.seen |= {tuple(t.shape) for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out


@pytest.mark.parametrize("method", [svdpeft.SORSA(rank=4), svdpeft.PiSSA(rank=4), svdpeft.SVFT(rank=64)], ids=str)
def test_no_dense_weight_is_built_in_a_forward_or_backward(method):
    model, x = nn.Sequential(nn.Linear(700, 600)), torch.randn(5, 700)
    adapter = svdpeft.attach(model, method)
    perturb(adapter)
    with Shapes() as shapes:
        model(x).sum().backward()
    assert (5, 600) in shapes.seen
    assert not {(600, 700), (700, 600)} & shapes.seen


def test_svft_starts_at_the_base_model_also_when_its_rank_is_cut():
    model, x = nn.Sequential(nn.Linear(12, 9)), torch.randn(4, 12)
    base = model(x)
    for method in (svdpeft.SVFT(), svdpeft.SVFT(pattern="random"), svdpeft.SVFT(rank=2)):
        adapter = svdpeft.attach(model, method)
        assert torch.equal(model(x), base)
        adapter.detach()


def test_weight_standardised_layers_are_merged_rightly():
    from timm.layers import ScaledStdConv2d

    model = nn.Sequential(ScaledStdConv2d(4, 6, 3), nn.Conv2d(6, 5, 1)).double()
    adapter = svdpeft.attach(model, svdpeft.PiSSA(rank=2), "all")
    assert adapter.sites["0"].path == "parametrised"
    perturb(adapter)
    x = torch.randn(2, 4, 6, 6).double()
    adapted = model(x)
    adapter.merge()
    close(model(x), adapted)
