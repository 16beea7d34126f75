"""A pattern that decides for nothing is an error that names it, whatever it is a pattern of; ranks that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import perturb, refused
from torch import nn

from svdpeft import SORSA, DoRA, FLoRA, LoRA, PiSSA, attach
from svdpeft.methods.base import PerSite


def net() -> nn.ModuleDict:
    torch.manual_seed(0)
    block = lambda: nn.ModuleDict({"qkv": nn.Linear(6, 18), "proj": nn.Linear(6, 6)})  # noqa: E731
    return nn.ModuleDict({"blocks": nn.ModuleList([block(), block()]), "head": nn.Linear(6, 3)})


def ranks(method: type[PerSite], rank: Any) -> PerSite:
    return DoRA(LoRA(rank=rank)) if method is DoRA else method(rank=rank)


@pytest.mark.parametrize("method", [LoRA, SORSA, FLoRA, DoRA])
@pytest.mark.parametrize(
    ("rank", "words"),
    [
        ({"qvk": 2, ".*": 1}, "'qvk' of rank matches no site that is adapted: did you mean 'qkv'?"),
        ({"qkv": 2, "blocks.0.qkv": 3, ".*": 1}, "'blocks.0.qkv' of rank has no effect: 'qkv', which stands before it"),
        ({".*": 1, "qkv": 2}, "'qkv' of rank has no effect: '.*', which stands before it, decides for blocks.0.qkv"),
        ({"qkv": 2, "proj": 1, "head": 3}, "'head' of rank matches no site that is adapted"),
    ],
)
def test_of_a_rank(method: type[PerSite], rank: Any, words: str):
    model = net()
    with refused(model, words):
        attach(model, ranks(method, rank), ["qkv", "proj"])


def test_the_rest_may_be_none():
    adapter = attach(net(), LoRA(rank={"blocks.0.qkv": 3, "qkv": 2, ".*": 1}), ["qkv"])
    assert [site.method.rank for site in adapter.sites.values()] == [3, 2]
    adapter = attach(net(), LoRA(rank={"qkv[q]": 3, "qkv": 2}), ["qkv[q,v]"])
    assert {name: site.method.rank for name, site in adapter.sites.items()} == {
        f"blocks.{i}.qkv[{part}]": rank for i in (0, 1) for part, rank in (("q", 3), ("v", 2))
    }


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["qkv", "blocks.0.qkv"], "targets='blocks.0.qkv' has no effect: 'qkv', which stands before it, decides for"),
        (
            {"all-linear": LoRA(rank=1), "proj": PiSSA(rank=1)},
            "targets='proj' has no effect: 'all-linear', which stands",
        ),
        (["qkw"], "targets='qkw' matches no weight of the model: did you mean 'qkv'?"),
    ],
)
def test_of_targets(targets: Any, words: str):
    model = net()
    with refused(model, words):
        attach(model, LoRA(rank=1), targets)


def test_of_exclude():
    model = net()
    with refused(model, "exclude='porj' matches nothing in the model: did you mean 'proj'?"):
        attach(model, LoRA(rank=1), exclude="porj")
    assert "blocks.0.proj" not in attach(model, LoRA(rank=1), exclude="proj").sites


def test_train_may_be_one_word():
    assert list(attach(net(), LoRA(rank=1), ["qkv"], train="head").whole) == ["head.weight", "head.bias"]
    model = net()
    with refused(model, "train='haed' names no parameter: did you mean 'head'?"):
        attach(model, LoRA(rank=1), ["qkv"], train="haed")


# -- ranks that do not fit -------------------------------------------------------------------------------------------


def test_a_rank_outside_of_a_depthwise_matrix_names_the_way_out():
    model = nn.ModuleDict({"dw": nn.Conv2d(8, 8, 3, groups=8), "pw": nn.Conv2d(8, 16, 1)})
    with refused(model, "rank 4 is outside [1, 1] at dw (1x9); clip_rank=True lowers it there"):
        attach(model, LoRA(rank=4), "all")


@pytest.mark.parametrize("options", [{"alpha": 16}, {"alpha": 16, "rs": True}, {"rs": True}, {}], ids=str)
@pytest.mark.parametrize("rank", [8, {"small": 8, ".*": 4}], ids=str)
@pytest.mark.parametrize("wrap", [lambda m: m, DoRA], ids=["plain", "in DoRA"])
def test_a_lowered_rank_keeps_the_scale(wrap: Any, rank: Any, options: dict[str, Any], tmp_path: Any):
    """α/r is that of the rank that was asked for: else clipping would turn it up, at the smallest matrices most."""
    import svdpeft

    model = nn.ModuleDict({"small": nn.Linear(5, 3), "large": nn.Linear(20, 12)})
    adapter = attach(model, wrap(LoRA(rank=rank, **options)), ["small", "large"], clip_rank=True)
    inner = [getattr(site.method, "inner", site.method) for site in adapter.sites.values()]
    assert [method.rank for method in inner] == [3, 8 if rank == 8 else 4]
    asked = [LoRA(rank=8, **options).scale, LoRA(rank=8 if rank == 8 else 4, **options).scale]
    assert [method.scale for method in inner] == pytest.approx(asked)
    perturb(adapter)
    adapter.save(tmp_path)
    deltas = {name: adapter.delta(name) for name in adapter.sites}
    adapter.detach()
    loaded = svdpeft.load(model, tmp_path)
    assert all(torch.equal(loaded.delta(name), delta) for name, delta in deltas.items())


def test_budgets_of_triplets_are_over_clipped_sites_too():
    model = nn.ModuleDict({"small": nn.Linear(5, 3), "large": nn.Linear(20, 12)})
    adapter = attach(model, LoRA(rank=8, alpha=16, allocate={"target_rank": 4}), ["small", "large"], clip_rank=True)
    assert len(adapter._steps.groups) == 1
