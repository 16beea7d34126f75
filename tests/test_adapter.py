"""The adapter's own behaviour: choosing sites, tied weights, several methods, merge reports, dropout, steps."""

from __future__ import annotations

import gc
import math
import weakref
from fractions import Fraction
from typing import Any

import pytest
import torch
from helpers import adapt, assert_same, close, equal_bits, host, perturb, refused, snapshot
from torch import Tensor, nn

import svdpeft
from svdpeft import SORSA, SVFT, Full, HeadOnly, LoRA, PiSSA, attach
from svdpeft.sites.weights import RoundedSum, stored


class Tied(nn.Module):
    """A head that shares the embedding's weight, and two layers that share theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6, dtype=torch.float64)
        self.up = nn.Linear(6, 5, dtype=torch.float64)
        self.down = nn.Linear(5, 6, dtype=torch.float64)
        self.again = nn.Linear(6, 5, dtype=torch.float64)
        self.again.weight = self.up.weight
        self.head = nn.Linear(6, 9, bias=False, dtype=torch.float64)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(torch.tanh(self.up(x)))
        return self.head(x + self.down(torch.tanh(self.again(x))))


TOKENS = torch.tensor([[0, 3, 8, 1]])


# -- choosing sites ------------------------------------------------------------------------------------------


def test_patterns_are_names_suffixes_or_whole_regular_expressions():
    names = ["a.q", "a.qq", "b.q", "b.v"]
    model = nn.ModuleDict({k: nn.ModuleDict({n[2:]: nn.Linear(3, 4) for n in names if n[0] == k}) for k in "ab"})
    for targets, exclude, expected in [
        ("q", (), ["a.q", "b.q"]),
        (["a.q", "v"], (), ["a.q", "b.v"]),
        (r".*\.q+", (), ["a.q", "a.qq", "b.q"]),
        ("all-linear", ("b.q",), ["a.q", "a.qq", "b.v"]),
        ("all", (r"a\..*",), ["b.q", "b.v"]),
    ]:
        adapter = attach(model, LoRA(rank=1), targets=targets, exclude=exclude)
        assert list(adapter.sites) == expected
        for name in set(names) - set(expected):
            excluded = [pattern for pattern in exclude if name not in expected]
            assert adapter.skipped[name] == (f"excluded by {excluded[0]!r}" if excluded else "not in targets")
        adapter.detach()


def test_all_linear_leaves_every_layer_of_a_head():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 5)
            self.head = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))

        def get_classifier(self) -> nn.Module:
            return self.head

    adapter = attach(Model(), LoRA(rank=1))
    assert list(adapter.sites) == ["body"]
    assert adapter.skipped == dict.fromkeys(("head.0", "head.2"), "output head; name it to adapt it")


def test_all_linear_leaves_the_output_head_and_the_convolutions():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.body, self.fc = nn.Conv1d(3, 4, 2), nn.Linear(4, 5), nn.Linear(5, 2)

        def get_classifier(self) -> nn.Module:
            return self.fc

    model = Model()
    assert list(attach(model, LoRA(rank=1), "all-linear").sites) == ["body"]
    both = attach(model, LoRA(rank=1), targets="all", name="all")
    assert list(both.sites) == ["conv", "body"]
    assert both.skipped == {"fc": "output head; name it to adapt it"}
    assert list(attach(model, LoRA(rank=1), targets=["fc"], name="named").sites) == ["fc"]


def test_a_mapping_gives_several_methods_and_the_first_match_wins():
    model = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(5, 6), "c": nn.Linear(4, 4), "d": nn.Linear(4, 3)})
    targets = {"a": SORSA(rank=2), "c": SVFT(), "[abc]": LoRA(rank=3), "d": Full()}
    with refused(model, "'d' matches no layer") if False else pytest.MonkeyPatch.context():
        adapter = attach(model, targets={k: m for k, m in targets.items() if k != "d"}, train=("d",))
    assert {n: s.method.name for n, s in adapter.sites.items()} == {"a": "sorsa", "b": "lora", "c": "svft"}
    assert set(adapter.whole) == {"d.weight", "d.bias"}
    assert adapter.trainable_count == 2 * 12 + 3 * 11 + 4 + 15
    assert set(adapter.roles()) == {"L", "C", "A", "whole"}
    adapter.after_step()


def test_rank_by_pattern():
    model = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(5, 6)})
    adapter = attach(model, PiSSA(rank={"a": 2, ".*": 3}, alpha=6.0))
    assert [site.method.rank for site in adapter.sites.values()] == [2, 3]
    assert [site.method.scale for site in adapter.sites.values()] == [3.0, 2.0]
    assert len(adapter._steps.groups) == 1, "one method, whatever the ranks"


def test_a_layer_that_is_trained_whole_is_not_adapted():
    model = nn.ModuleDict({"a": nn.Linear(6, 5), "head": nn.Linear(5, 3)})
    adapter = attach(model, LoRA(rank=1), train=("head",))
    assert list(adapter.sites) == ["a"]
    assert adapter.skipped["head"] == "trained whole"
    bare = nn.Linear(6, 5)  # the model is the layer: its name is empty
    with pytest.raises(ValueError, match="trained whole"):
        attach(bare, LoRA(rank=1), train=("weight",))


def test_a_model_that_is_one_layer():
    model = nn.Linear(6, 5, dtype=torch.float64)
    before, x = snapshot(model), torch.randn(2, 6, dtype=torch.float64)
    adapter = attach(model, PiSSA(rank=2))
    perturb(adapter)
    out = model(x)
    adapter.merge()
    close(model(x), out)
    adapter.detach()
    assert_same(before, snapshot(model))


# -- tied weights --------------------------------------------------------------------------------------------


def test_two_layers_with_one_weight_share_one_site():
    model = Tied()
    before, expected = snapshot(model), model(TOKENS)
    adapter = attach(model, PiSSA(rank=2))
    assert list(adapter.sites) == ["up", "down"]
    assert adapter.sites["up"].owners == [model.up, model.again]
    assert torch.equal(model(TOKENS), expected)
    perturb(adapter)
    adapted = model(TOKENS)
    weight = stored(model.up, "weight").clone()
    adapter.merge()
    close(model(TOKENS), adapted)
    assert stored(model.again, "weight") is stored(model.up, "weight")
    close(stored(model.up, "weight").detach(), weight.detach() + adapter.delta("up"))
    adapter.unmerge()
    assert torch.equal(model(TOKENS), adapted)
    assert adapter.trainable_count == sum(p.numel() for p in set(adapter.parameters())) == 2 * 2 * 11
    with pytest.raises(ValueError, match="up shares its weight with other layers: folding is refused there"):
        adapter.fold()
    assert adapter.state == "attached"
    adapter.detach()
    assert_same(before, snapshot(model))


def test_one_of_two_tied_layers_alone():
    for targets, exclude in ((["up"], ()), ([r"up|again"], ("again",))):
        adapter = attach(Tied(), PiSSA(rank=2), targets, exclude)
        assert [place.module for place in adapter.sites["up"].places] == [adapter.model.up]
    assert len(attach(Tied(), PiSSA(rank=2), targets=["up", "again"]).sites["up"].places) == 2
    assert "up" in attach(Tied(), PiSSA(rank=2), exclude=("again",)).skipped  # nobody has named it


def test_head_tied_to_an_embedding():
    model = Tied()
    embedding = model.embed.weight.clone()
    adapter = attach(model, PiSSA(rank=2))
    assert adapter.skipped["head"].startswith("its weight is shared with embed, which is not adapted")
    perturb(adapter)
    adapter.merge()
    assert equal_bits(stored(model.embed, "weight"), embedding)
    adapter.detach()


def test_head_and_embedding_share_one_adapter_if_both_are_named():
    """One update, used by a lookup in one place and by a product in the other."""
    model = Tied()
    before, base = snapshot(model), model.embed.weight.detach().clone()
    expected = model(TOKENS)
    adapter = attach(model, PiSSA(rank=2), targets=["embed", "head"])
    assert list(adapter.sites) == ["embed"]
    assert [place.kind.name for place in adapter.sites["embed"].places] == ["embedding", "linear"]
    assert torch.equal(model(TOKENS), expected)
    perturb(adapter)
    adapted = model(TOKENS)
    dense = Tied()
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if "svdpeft" not in k})
    with torch.no_grad():
        dense.embed.weight += adapter.delta("embed")
    close(adapted.detach(), dense(TOKENS).detach())
    adapter.merge()
    close(model(TOKENS), adapted)
    assert stored(model.head, "weight") is stored(model.embed, "weight"), "still tied"
    adapter.unmerge()
    assert equal_bits(stored(model.embed, "weight"), base)
    adapter.detach()
    assert_same(before, snapshot(model))


def test_training_a_tied_head_whole_trains_what_it_shares():
    model = Tied()
    before = snapshot(model)
    adapter = attach(model, PiSSA(rank=2), train=("head",))
    assert list(adapter.whole) == ["embed.weight"]
    perturb(adapter)
    assert model.head.weight is model.embed.weight
    adapter.detach()
    assert_same(before, snapshot(model))


# -- merge reports -------------------------------------------------------------------------------------------


def test_merge_report_in_float64_and_of_nothing():
    model, _ = host(("linear", 0))
    adapter = adapt(model, PiSSA(rank=2))
    assert adapter.merge().lost == {"layer": 0.0}
    adapter.unmerge()
    perturb(adapter)
    report = adapter.merge()
    assert report.worst < 1e-14
    assert "merged 1 sites" in str(report)
    model = nn.ModuleDict({"head": nn.Linear(3, 2)})
    report = attach(model, HeadOnly(), train=("head",)).merge()
    assert (report.worst, str(report)) == (0.0, "merged 0 sites")


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1e-1])
def test_merge_report_measures_what_bfloat16_loses(size: float):
    """Against the loss computed here: the update that arrived in the stored weight, and the one that should have."""
    model = nn.ModuleDict({name: nn.Linear(64, 48).bfloat16() for name in "ab"})
    base = {name: model[name].weight.detach().double() for name in "ab"}
    adapter = attach(model, LoRA(rank=4))
    perturb(adapter, size=size**0.5 / 2)
    report = adapter.merge()
    for name in "ab":
        wanted = adapter.delta(name).double()
        arrived = stored(model[name], "weight").detach().double() - base[name]
        lost = float((arrived - wanted).norm() / wanted.norm())
        assert report.lost[name] == pytest.approx(lost, rel=1e-3)
        assert lost < 0.05 if size == 1e-1 else lost > 0.01
    assert report.worst == max(report.lost.values())
    assert f"at most {report.worst:.2%} at {max(report.lost, key=report.lost.__getitem__)}" in str(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1e-12, 1e-8, 1e-4, 1e-2, 1.0, 1e3])
def test_what_rounding_loses_is_told_for_updates_of_every_size(size: float, dtype: torch.dtype):
    """One that is lost in the sum already, in float32, and one beside which the weight is small."""
    draws = torch.Generator().manual_seed(0)
    w, added = torch.randn(64, 48, generator=draws).to(dtype), size * torch.randn(64, 48, generator=draws)
    sums = RoundedSum(dtype)
    made = torch.cat([sums.of(w[:40], added[:40]), sums.of(w[40:], added[40:])])
    missing = made.double() - (w.double() + added.double())
    assert sums.lost == pytest.approx(float(missing.norm() / added.double().norm()), rel=1e-3)


def test_what_rounding_loses_is_told_where_squares_overflow():
    draws = torch.Generator().manual_seed(0)
    w, added = torch.zeros(64, 48, dtype=torch.bfloat16), 1e30 * torch.randn(64, 48, generator=draws)
    sums = RoundedSum(torch.bfloat16)
    missing = sums.of(w, added).double() - added
    assert sums.lost == pytest.approx(float(missing.norm() / added.double().norm()), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [3, 700])
def test_a_sum_in_the_place_of_the_weight_is_the_sum(rows: int, dtype: torch.dtype):
    """In parts and into memory that is there; the slow twin is one sum of all of it."""
    draws = torch.Generator().manual_seed(0)
    w = torch.randn(rows, 401, generator=draws, dtype=torch.float64).to(dtype)
    added = torch.randn(rows, 401, generator=draws, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    place, sums = torch.empty_like(w), RoundedSum(dtype)
    assert sums.of(w, added, place) is place
    assert equal_bits(place, (w.to(added.dtype) + added).to(dtype))
    assert 0 < sums.lost < 2 * torch.finfo(dtype).eps
    again = RoundedSum(dtype)
    assert equal_bits(torch.cat([again.of(w[:2], added[:2]), again.of(w[2:], added[2:])]), place)
    assert again.lost == pytest.approx(sums.lost, rel=1e-5)
    for size, expected in ((math.nan, math.nan), (0.0, 0.0)):
        sums = RoundedSum(dtype)
        sums.of(w, torch.full_like(added, size))
        assert sums.lost == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("laid", ["as it is", "transposed"])
def test_a_merge_that_would_not_be_finite_leaves_the_weight_and_no_copy(laid: str):
    """It is noticed when the values are in their place; a weight may lie there in another order."""
    model = nn.ModuleDict({"a": nn.Linear(6, 5)})
    if laid == "transposed":
        model["a"].weight.data = model["a"].weight.detach().mT.contiguous().mT
    before, place = model["a"].weight.detach().clone(), model["a"].weight.data_ptr()
    adapter = attach(model, LoRA(rank=2))
    perturb(adapter, size=0.1)
    expected = before + adapter.delta("a")
    adapter.merge()
    assert equal_bits(stored(model["a"], "weight").detach(), expected)
    adapter.unmerge()
    assert equal_bits(stored(model["a"], "weight").detach(), before)
    with torch.no_grad():
        next(adapter.parameters()).fill_(math.inf)
    with pytest.raises(ValueError, match="the training has diverged"):
        adapter.merge()
    weight = adapter.sites["a"].weight
    assert equal_bits(weight.tensor, before)
    assert weight.tensor.data_ptr() == place
    assert not weight.overwritten
    assert weight._original is None


def test_two_adapters_in_one_bfloat16_weight_are_rounded_once():
    model = nn.ModuleDict({"a": nn.Linear(64, 48).bfloat16()})
    base = model["a"].weight.detach().clone()
    adapters = [attach(model, LoRA(rank=4), name=name, seed=seed) for seed, name in enumerate(("one", "two"))]
    for adapter in adapters:
        perturb(adapter, size=0.05)
        adapter.merge()
    exact = base.float() + adapters[0].delta("a") + adapters[1].delta("a")
    assert equal_bits(stored(model["a"], "weight").detach(), exact.bfloat16())


def test_permanent_merge_with_a_head_keeps_what_was_trained():
    model, x = host(("linear", 0))
    adapter = adapt(model, PiSSA(rank=2), train=("head",))
    perturb(adapter)
    adapted, keys = model(x), list(host(("linear", 0))[0].state_dict())
    adapter.merge(permanent=True)
    close(model(x), adapted)
    assert list(model.state_dict()) == keys
    assert not hasattr(model, "_svdpeft")
    assert all(p.requires_grad for p in model.parameters())
    again = adapt(model, SVFT())
    close(model(x), adapted)
    again.detach()
    close(model(x), adapted)


def test_permanent_merge_lets_the_copies_go():
    model, _ = host(("linear", 0))
    adapter = adapt(model, PiSSA(rank=2))
    factors = weakref.ref(adapter.sites["layer"].factors)
    adapter.merge(permanent=True)
    del adapter
    gc.collect()
    assert factors() is None


# -- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LoRA(rank=2, dropout=0.5), PiSSA(rank=2, dropout=0.5)], ids=str)
def test_dropout_acts_in_training_only_and_not_at_the_start(method: Any):
    model, x = host(("linear", 0))
    layer, base = model.layer, model.layer(x)
    adapter = adapt(model, method)
    layer.train()
    assert torch.equal(layer(x), base)
    perturb(adapter)
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    adapted = layer(x)
    layer.train()
    mean = torch.stack([layer(x).detach() for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, adapted.detach(), rtol=0, atol=0.1 * float((adapted - base).detach().abs().max()))


def test_penalty_sums_over_methods():
    model = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(5, 6)}).double()
    both = attach(model, targets={"a": SORSA(rank=2, mode="loss"), "b": SORSA(rank=2, mode="loss", gamma=1.0)})
    perturb(both)
    parts = [s.method.penalty([s.factors]) for s in both.sites.values()]
    close(both.penalty().detach(), (parts[0] + parts[1]).detach())
    assert attach(model, LoRA(rank=1), name="lora").penalty() is None


@pytest.mark.parametrize("method", [LoRA(rank=2), PiSSA(rank=2), SORSA(rank=2), SVFT(pattern="banded")], ids=str)
def test_training_lowers_the_loss_and_leaves_the_base_alone(method: Any):
    model, x = host(("linear", 0))
    target = torch.randn(model(x).shape, dtype=torch.float64)
    adapter = adapt(model, method, train=("head",))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        adapter.before_step(1e-2)
        optimizer.step()
        adapter.after_step(1.0)
    assert losses[-1] < 0.8 * losses[0]
    assert {"layer.weight", "layer.bias"} <= frozen.keys()
    for n, p in frozen.items():
        assert equal_bits(model.get_parameter(n), p)


def test_flags_that_were_off_before_stay_off_afterwards():
    model, _ = host(("linear", 0))
    model.layer.weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    before = snapshot(model)
    one, two = adapt(model, LoRA(rank=1), train=("norm",)), adapt(model, LoRA(rank=1), name="two")
    assert model.norm.bias.requires_grad
    one.detach()
    assert not model.norm.bias.requires_grad
    assert all(p.requires_grad for p in two.parameters())
    two.detach()
    assert_same(before, snapshot(model))


# -- the public names ----------------------------------------------------------------------------------------


def test_names_of_the_package():
    assert svdpeft.methods() == sorted(svdpeft.methods())
    for name in svdpeft.methods():
        cls = svdpeft.method(name)
        assert getattr(svdpeft, cls.__name__) is cls
        assert cls.__name__ in dir(svdpeft)
        if cls.reference is not None:
            entry = svdpeft.cite(name)
            assert entry.count("{") == entry.count("}")
            for word in (cls.reference.key, cls.reference.title, cls.reference.authors, str(cls.reference.year)):
                assert word in entry
    assert svdpeft.cite("sorsa", "full", "sorsa") == svdpeft.cite("sorsa")


def test_delta_is_what_is_added():
    model, x = host(("conv", 0))
    base, adapter = model.layer.weight.clone(), adapt(model, SORSA(rank=2))
    perturb(adapter)
    expected = model.layer(x)
    delta = adapter.delta("layer")
    assert delta.shape == base.shape
    assert not delta.requires_grad
    adapter.detach()
    with torch.no_grad():
        stored(model.layer, "weight").add_(delta)
    close(model.layer(x), expected)
    half, _ = host(("linear", 0), dtype=torch.bfloat16)
    assert adapt(half, LoRA(rank=2)).delta("layer").dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1e-2, 1e-7, 1e-9, 1e-14])
def test_merge_report_is_of_the_weight_s_own_dtype(size: float, dtype: torch.dtype):
    """The sum of a float32 weight is formed in float32: what that loses is told, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30, dtype=dtype)).requires_grad_(False)
    adapter = attach(model, LoRA(rank=2))
    perturb(adapter)
    with torch.no_grad():
        adapter.site("0").factors.L.mul_(size)
    w = stored(model[0], "weight").detach().clone()
    before, delta = (t.flatten().tolist() for t in (w, adapter.delta("0")))
    exact = [Fraction(a) + Fraction(b) for a, b in zip(before, delta, strict=True)]
    report = adapter.merge()
    after = stored(model[0], "weight").flatten().tolist()
    off = [float(Fraction(found) - wanted) for found, wanted in zip(after, exact, strict=True)]
    change = [float(wanted - Fraction(a)) for wanted, a in zip(exact, before, strict=True)]
    expected = math.hypot(*off) / math.hypot(*change)
    assert report.worst == pytest.approx(expected, rel=1e-3, abs=1e-18)
    assert report.worst > 0
