"""Several adapters made one: against the dense formulas, and the nearest matrix of a rank."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close, perturb
from torch import Tensor, nn

import svdpeft
from svdpeft import OFT, SORSA, LoRA, PiSSA, attach, combine, load
from svdpeft.adapter.combining import ties


def two(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.GELU(), nn.Linear(8, 7)).to(dtype).eval()
    a = attach(model, PiSSA(rank=2), ["0", "2"], name="a")
    b = attach(model, LoRA(rank=3, alpha=2.0), ["0"], name="b")
    perturb(a)
    perturb(b)
    return model, a, b


def test_it_acts_merges_and_is_saved_as_any_other(tmp_path: Path):
    model, a, b = two()
    x = torch.randn(4, 9, dtype=torch.float64)
    before = model(x)
    made = combine([(a, 0.5), (b, 2.0)], name="both").adapter
    assert made.state == "disabled"
    assert torch.equal(model(x), before)
    svdpeft.only(model, "both")
    out = model(x)
    w = [model[i]._parameters["weight"] for i in (0, 2)]
    first = nn.functional.linear(x, w[0] + 0.5 * a.delta("0") + 2 * b.delta("0"), model[0].bias)
    close(out, nn.functional.linear(nn.functional.gelu(first), w[1] + 0.5 * a.delta("2"), model[2].bias))
    made.merge()
    close(model(x), out)
    made.save(tmp_path / "both")
    for adapter in (a, b, made):
        adapter.detach()
    load(model, tmp_path / "both")
    close(model(x), out)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_of_a_rank_it_is_the_nearest_and_says_what_it_lacks(rank: int):
    _, a, b = two()
    exact = 0.7 * a.delta("0") + 0.3 * b.delta("0")
    made = combine([(a, 0.7), (b, 0.3)], rank=rank)
    u, s, vh = torch.linalg.svd(exact)
    close(made.adapter.delta("0"), u[:, :rank] * s[:rank] @ vh[:rank])
    assert made.lost["0"] == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-9)
    assert made.adapter.sites["0"].method.rank == rank
    where = max(made.lost, key=made.lost.get)
    assert f"at most {made.lost[where]:.2%} of an update is lost, at {where}" in str(made)


def test_full_rank_updates_are_summed_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6)).double()
    a, b = attach(model, OFT(block_size=4), ["0"], name="a"), attach(model, LoRA(rank=1), ["0"], name="b")
    perturb(a)
    perturb(b)
    close(combine([(a, 1.0), (b, 2.0)]).adapter.delta("0"), a.delta("0") + 2 * b.delta("0"))


def slow_ties(deltas: list[Tensor], density: float) -> Tensor:
    """Entry by entry, as the paper says it."""
    found = torch.zeros_like(deltas[0])
    keep = [
        set(sorted(range(d.numel()), key=lambda i, d=d: -abs(float(d.flatten()[i])))[: round(density * d.numel())])
        for d in deltas
    ]
    for i in range(found.numel()):
        values = [float(d.flatten()[i]) for d, kept in zip(deltas, keep, strict=True) if i in kept]
        sign = math.copysign(1, sum(values)) if sum(values) else 0
        agreeing = [v for v in values if v * sign > 0]
        found.view(-1)[i] = sum(agreeing) / len(agreeing) if agreeing else 0
    return found


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_the_papers(density: float):
    _, a, b = two()
    deltas = [0.8 * a.delta("0"), -1.5 * b.delta("0")]
    expected = slow_ties(deltas, density)
    close(ties(deltas, density), expected)
    close(combine([(a, 0.8), (b, -1.5)], how="ties", density=density).adapter.delta("0"), expected)
    assert combine([(a, 0.8), (b, -1.5)], rank=1, how="ties", density=density, name="low").lost["0"] > 0


def test_dare_drops_and_rescales():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(120, 100, bias=False)).double()
    adapter = attach(model, LoRA(rank=4), ["0"])
    perturb(adapter)
    delta = adapter.delta("0")
    made = combine([(adapter, 2.0)], how="dare", density=0.25).adapter.delta("0")
    kept = made.abs() > 1e-9 * made.abs().max()
    torch.testing.assert_close(made[kept], 2 / 0.25 * delta[kept], atol=1e-9, rtol=1e-7)
    assert abs(float(kept.double().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / kept.numel())
    again = combine([(adapter, 2.0)], how="dare", density=0.25, name="again").adapter.delta("0")
    other = combine([(adapter, 2.0)], how="dare", density=0.25, name="other", seed=1).adapter.delta("0")
    assert torch.equal(again, made)
    assert not torch.allclose(other, made)
    whole = combine([(adapter, 1.0)], how="dare", density=1.0, name="whole").adapter.delta("0")
    torch.testing.assert_close(whole, delta, atol=1e-12, rtol=1e-9)


def test_heads_are_added_as_what_they_have_learned():
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    base = model["head"].weight.detach().clone()
    pair = []
    for i, name in enumerate("ab"):
        adapter = attach(model, LoRA(rank=1), ["body"], train=["head"], name=name)
        with torch.no_grad():
            adapter.own["head.weight"].add_(i + 1)
        pair.append(adapter)
    values = [adapter.own["head.weight"].detach().clone() for adapter in pair]
    made = combine([(pair[0], 0.5), (pair[1], 0.25)]).adapter
    expected = base + 0.5 * (values[0] - base) + 0.25 * (values[1] - base)
    torch.testing.assert_close(made.own["head.weight"].detach(), expected)


def test_a_site_that_only_one_has_and_a_tied_weight():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)}).double()
    model["head"].weight = model["embed"].weight
    a = attach(model, SORSA(rank=2), ["embed", "head"], name="a")
    perturb(a)
    made = combine([(a, 3.0)]).adapter
    assert len(made.sites["embed"].places) == 2
    close(made.delta("embed"), 3 * a.delta("embed"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapters": []}, "at least one adapter"),
        ({"weight": math.nan}, "weight nan of adapter 'a' is not finite"),
        ({"rank": 0}, "rank 0 is not a whole number of at least 1"),
        ({"how": "tie"}, "how='tie': did you mean 'ties'"),
        ({"density": 0.0}, r"density 0.0 is outside \(0, 1\]"),
        ({"name": "a"}, "an adapter named 'a' is attached already"),
        ({"twice": True}, "adapter 'a' is given twice"),
        ({"elsewhere": True}, "is not attached to the model of adapter 'a'"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_attached(change: dict[str, Any], words: str):
    model, a, b = two()
    given = change.pop("adapters", [(a, change.pop("weight", 1.0)), (b, 1.0)])
    if change.pop("twice", False):
        given = [*given, (a, 1.0)]
    if change.pop("elsewhere", False):
        given = [*given, (two()[1], 1.0)]
    with pytest.raises(ValueError, match=words):
        combine(given, **change)
    assert list(svdpeft.adapters(model)) == ["a", "b"]


def test_statistics_have_no_sum():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    adapter = attach(model, LoRA(rank=1), ["0"])
    model.train()(torch.randn(8, 4))
    with pytest.raises(ValueError, match=r"has changed 1\.running_mean: running statistics have no sum"):
        combine([(adapter, 1.0)])
