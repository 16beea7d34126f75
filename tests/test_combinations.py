"""What composes with what, for every method of the zoo; what does not is refused with the reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import Host, adapt, close, differs, host, perturb, refused
from torch import nn

from svdpeft import DoRA
from svdpeft.layers.quantising import put, scheme_named
from svdpeft.methods.base import Factored, PerSite, Scaled
from svdpeft.methods.base.allocation import Budget
from svdpeft.registry import METHODS
from svdpeft.zoo import card

LINEAR = ("linear", 0)
PER_SITE = [cls for cls in METHODS.values() if issubclass(cls, PerSite)]
every_class = pytest.mark.parametrize("cls", PER_SITE, ids=lambda cls: cls.name)


def fields(cls: type[PerSite]) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def defined(cls: type[PerSite]) -> bool:
    """Whether the method is defined on the linear layer of these tests."""
    return not cls.pairs and not card(cls.name).kinds["linear"]


def small(cls: type[PerSite]) -> PerSite:
    """The method at rank 2, where it has a rank that can be chosen."""
    try:
        return cls(rank=2)  # type: ignore[call-arg]
    except (TypeError, ValueError):
        return cls()


def lives(method: PerSite) -> None:
    """Attach, move, merge and give back."""
    model, x = host(LINEAR)
    before = model(x)
    adapter = adapt(model, method)
    if method.exact_start:
        assert torch.equal(model(x), before)
    perturb(adapter)
    moved = model(x)
    assert differs(moved, before)
    adapter.merge()
    close(model(x), moved)
    adapter.unmerge()
    adapter.detach()
    assert torch.equal(model(x), before)


@every_class
def test_dora_goes_on_top_or_says_why_not(cls: type[PerSite]):
    says = card(cls.name).combines["DoRA(…) on top"]
    if says == "yes":
        if defined(cls):
            lives(DoRA(inner=small(cls)))
        return
    with pytest.raises(ValueError, match=cls.__name__):
        DoRA(inner=cls())


@every_class
def test_a_rank_per_site(cls: type[PerSite]):
    says = card(cls.name).combines["a rank per site, rank={pattern: r}"]
    if says != "yes":
        with pytest.raises((TypeError, ValueError)):
            cls(rank={".*": 2})  # type: ignore[call-arg]
    elif defined(cls):
        lives(cls(rank={"layer": 2, ".*": 4}))  # type: ignore[call-arg]


@every_class
def test_rank_stabilised_scale_or_the_reason(cls: type[PerSite]):
    if not issubclass(cls, Factored):
        return
    if not issubclass(cls, Scaled):
        for options in ({"rs": True}, {"alpha": 3.0}):
            with pytest.raises(TypeError, match=next(iter(options))):
                cls(**options)
        return
    plain, stable = (cls(rank=4, alpha=6.0, rs=rs).at("a", 16, 36) for rs in (False, True))
    assert stable.scale / plain.scale == pytest.approx(2)  # √r
    if defined(cls):
        lives(cls(rank=2, alpha=3.0, rs=True))


@every_class
def test_allocate_or_the_reason(cls: type[PerSite]):
    says = card(cls.name).combines["allocate=Budget(…)"]
    if says != "yes":
        assert "triplets" in says or "inner" in fields(cls)
        assert "allocate" not in fields(cls)
        return
    method = cls(rank=4, allocate=Budget(target_rank=2, total_steps=4))  # type: ignore[call-arg]
    model, x = host(LINEAR)
    adapter = adapt(model, method)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        adapter.before_step(0.1)
        optimizer.step()
        adapter.after_step()
    product = adapter.sites["layer"].method.product(adapter.sites["layer"].factors)
    # Two triplets, twice where the start is subtracted; KaSA has also taken the four smallest out of the weight.
    bound = (4 if method.anchored and method.exact_start else 2) + (0 if method.exact_start else 4)  # type: ignore[attr-defined]
    rank = int(torch.linalg.matrix_rank(product.dense().detach(), rtol=1e-9))
    assert 0 < rank <= bound


@every_class
def test_a_quantised_base_or_the_reason(cls: type[PerSite]):
    says = card(cls.name).combines["a quantised base"]
    assert says.startswith("yes") == defined(cls)
    if not defined(cls):
        return
    model = Host(nn.Linear(64, 32), 32, torch.float32).eval()
    put(model.layer, "weight", scheme_named("nf4")(model.layer.weight.detach()))
    x = torch.randn(2, 64, requires_grad=True)
    before = model(x)
    adapter = adapt(model, small(cls))
    if adapter.sites["layer"].method.exact_start:
        assert torch.equal(model(x), before)
    perturb(adapter)
    assert differs(model(x), before)


@every_class
def test_a_base_that_is_stored_in_an_unknown_way_is_refused(cls: type[PerSite]):
    if not defined(cls):
        return
    model = nn.ModuleDict({"layer": nn.Linear(7, 5)})
    model["layer"].weight = nn.Parameter(torch.zeros(5, 7, dtype=torch.float8_e4m3fn), requires_grad=False)
    with refused(model, "layer", "quantised"):
        adapt(model, small(cls))
