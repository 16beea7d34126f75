"""Interruptions, changed models, hooks of others, adapters on parts of one model: nothing is lost or doubled."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers import Both, adapt, assert_same, close, equal_bits, host, perturb, refused, snapshot
from torch import Tensor, nn

from svdpeft import SORSA, SVFT, LoRA, PiSSA, attach
from svdpeft.methods.base import Method
from svdpeft.sites.weights import BaseWeight, stored


def stack() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    return model, torch.randn(3, 6, dtype=torch.float64)


@pytest.mark.parametrize("change", ["merge", "fold", "unmerge", "unfold", "disabled", "detach"])
@pytest.mark.parametrize("method", [PiSSA(rank=2), SVFT()], ids=str)
def test_an_interrupted_change_leaves_the_adapter_attached(change: str, method: Any, monkeypatch: pytest.MonkeyPatch):
    model, x = stack()
    before, base = snapshot(model), model(x)
    adapter = attach(model, method)
    perturb(adapter)
    expected = model(x)
    if change in ("unmerge", "disabled", "detach"):
        adapter.merge()
    elif change == "unfold":
        adapter.fold()
    count = 0
    for name in ("write", "erase"):
        real = getattr(BaseWeight, name)

        def fails(*args: Any, real: Any = real) -> Any:
            nonlocal count
            count += 1
            if count == 2:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(BaseWeight, name, fails)
    if change in ("fold", "unfold") and method.name == "svft":  # nothing is written for a full-rank site
        return
    with pytest.raises(KeyboardInterrupt):
        adapter.disabled().__enter__() if change == "disabled" else getattr(adapter, change)()
    monkeypatch.undo()
    assert adapter.state == "attached"
    assert all(site.active and not site.folded and not site.weight.written(site) for site in adapter.sites.values())
    close(model(x), expected)
    adapter.merge()
    close(model(x), expected)
    adapter.detach()
    assert_same(before, snapshot(model))
    assert torch.equal(model(x), base)


def test_an_interrupted_detach_can_be_repeated(monkeypatch: pytest.MonkeyPatch):
    from svdpeft.sites.site import Site

    model, _ = stack()
    before = snapshot(model)
    adapter = attach(model, PiSSA(rank=2))
    perturb(adapter)
    real, count = Site.remove, 0

    def fails(self: Site) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(Site, "remove", fails)
    with pytest.raises(KeyboardInterrupt):
        adapter.detach()
    adapter.detach()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("first", [True, False], ids=["hook first", "adapter first"])
def test_hooks_of_the_user_see_the_adapted_output(first: bool):
    model, x = stack()
    seen: list[Tensor] = []

    def relu(_m: nn.Module, _a: Any, out: Tensor) -> Tensor:
        seen.append(out.clone())
        return torch.relu(out)

    if first:
        model[2].register_forward_hook(relu)
    adapter = attach(model, PiSSA(rank=2))
    if not first:
        model[2].register_forward_hook(relu)
    perturb(adapter)
    adapted = model(x)
    adapter.merge()
    close(model(x), adapted)
    close(seen[0], seen[1])


def test_a_forward_that_somebody_put_on_a_layer_is_called_in_every_state():
    model, x = nn.ModuleDict({"layer": nn.Linear(6, 5).double()}), torch.randn(2, 6).double()
    layer, calls = model["layer"], []

    def counted(x: Tensor) -> Tensor:
        calls.append(len(x))
        return nn.Linear.forward(layer, x)

    layer.forward = counted
    adapter = attach(model, SVFT())  # folded, its factors alone would be enough
    perturb(adapter)
    expected = layer(x)
    for into, back in (("fold", "unfold"), ("merge", "unmerge")):
        getattr(adapter, into)()
        close(layer(x), expected)
        getattr(adapter, back)()
    adapter.detach()
    assert layer.forward is counted
    assert calls == [2, 2, 2]


def test_a_tied_weight_under_two_parameter_names():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 6, dtype=torch.float64)
            self.head = nn.Parameter(torch.empty(0))
            self.head = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.embed(ids) @ self.head.mT

    torch.manual_seed(0)
    model, ids = Tied(), torch.tensor([1, 4])
    before = snapshot(model)
    adapter = attach(model, PiSSA(rank=2), targets=["embed", "head"])
    perturb(adapter)
    adapted = model(ids)
    w = stored(model.embed, "weight") + adapter.delta(next(iter(adapter.sites)))
    close(adapted.detach(), w[ids] @ w.T)
    adapter.merge()
    close(model(ids), adapted)
    adapter.detach()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("other", [SORSA(rank=2), LoRA(rank=3)], ids=str)
def test_two_methods_for_one_tied_weight_are_refused(other: Method):
    model = nn.ModuleDict({"a": nn.Linear(5, 4), "b": nn.Linear(5, 4)})
    model["b"].weight = model["a"].weight
    with refused(model, "a cannot be adapted", "another method is named", str(other)):
        attach(model, targets={"a": LoRA(rank=2), "b": other})


def test_a_weight_is_adapted_or_trained_whole():
    model, _ = stack()
    attach(model, LoRA(rank=2), targets=["0"], train=["4"])
    with refused(model, "0.weight cannot be trained whole: another adapter adapts it, as 0"):
        attach(model, LoRA(rank=2), targets=["2"], train=["0"], name="two")
    two = attach(model, LoRA(rank=2), name="two")
    assert list(two.sites) == ["0", "2"]
    assert two.skipped["4"] == "trained whole"


def test_adapters_on_a_part_and_on_the_whole():
    model, x = stack()
    model = nn.ModuleDict({"body": model, "head": nn.Linear(4, 3, dtype=torch.float64)})
    before = snapshot(model)
    part = attach(model["body"], PiSSA(rank=2), targets=["0"], train=["4"])
    trains = dict(part.named_parameters())
    with refused(model, "body.0 has an adapter named 'default' already"):
        attach(model, LoRA(rank=2))
    whole = attach(model, LoRA(rank=2), targets=["body.0", "body.2"], name="whole")
    assert all(p.requires_grad for p in trains.values()), "the first still trains"
    for adapter in (part, whole):
        perturb(adapter)
    expected = model["body"](x)
    for adapter in (part, whole):
        adapter.merge()
    close(model["body"](x), expected)
    whole.detach()
    assert all(p.requires_grad for p in trains.values())
    part.detach()
    assert_same(before, snapshot(model))


def test_a_head_that_was_replaced_after_attaching():
    model, x = stack()
    adapter = attach(model, PiSSA(rank=2), targets=["0"])
    perturb(adapter)
    model[4] = nn.Linear(7, 2, bias=False, dtype=torch.float64)
    attach(model, LoRA(rank=2), targets=["2"], name="two").detach()
    adapter.detach()
    assert model[0].weight.requires_grad
    assert model(x).shape == (3, 2)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [(r".*\.to_[qkv]", ["a.to_q", "a.to_k", "a.to_v"]), (r".*\.to_[qk]", ["a.to_q", "a.to_k"]), ("to_q", ["a.to_q"])],
)
def test_regular_expressions_that_end_in_a_class(pattern: str, names: list[str]):
    model = nn.ModuleDict({"a": nn.ModuleDict({f"to_{part}": nn.Linear(4, 3) for part in "qkvo"})})
    assert list(attach(model, LoRA(rank=1), targets=pattern).sites) == names


def fused() -> nn.ModuleDict:
    return nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(4, 12), "proj": nn.Linear(4, 4)})})


def test_exclude_takes_what_targets_takes():
    for exclude, names in [
        ("proj", ["attn.qkv"]),
        (["qkv[k]"], ["attn.qkv[q]", "attn.qkv[v]", "attn.proj"]),
        (["qkv[k,v]"], ["attn.qkv[q]", "attn.proj"]),
        (["qkv"], ["attn.proj"]),
    ]:
        adapter = attach(fused(), LoRA(rank=1), exclude=exclude)
        assert list(adapter.sites) == names
    for wrong in ("qkv[kk]", "proj[k]"):
        with pytest.raises(ValueError, match=re.escape(f"exclude={wrong!r} matches nothing")):
            attach(fused(), LoRA(rank=1), exclude=[wrong])
    with pytest.raises(ValueError, match=re.escape("exclude='porj' matches nothing in the model: did you mean 'proj'")):
        attach(fused(), LoRA(rank=1), exclude=["porj"])


def test_ranks_of_parts():
    for rank, expected in [
        ({"qkv[q,v]": 3, ".*": 2}, [3, 2, 3]),
        ({"qkv": 3, ".*": 2}, [3, 3, 3]),
        ({"qkv[k]": 3, ".*": 1}, [1, 3, 1]),
    ]:
        adapter = attach(fused(), LoRA(rank=rank), targets=["qkv[q,k,v]"])
        assert [site.method.rank for site in adapter.sites.values()] == expected


def test_the_padding_row_of_an_embedding_never_trains():
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4, padding_idx=0)})
    adapter = attach(model, PiSSA(rank=2), targets=["embed"])
    model["embed"](torch.tensor([0, 1, 2])).sum().backward()
    gradient = adapter.sites["embed"].factors.L.grad
    assert not gradient[0].any()
    assert gradient[1].any()


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")  # torch says so once in a process
def test_an_encoder_with_a_padding_mask():
    """torch packs the batch into a nested tensor, on which nothing works in place."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    adapter = attach(model, PiSSA(rank=2))
    perturb(adapter, size=0.1)
    with torch.no_grad():
        adapted = model(x, src_key_padding_mask=mask)
    adapter.merge()
    with torch.no_grad():
        merged = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(adapted[~mask], merged[~mask], rtol=1e-4, atol=1e-5)


def test_check_reach_and_a_frozen_norm():
    model, x = host(("linear", 0))
    model.train()
    adapter = adapt(model, PiSSA(rank=2), batch_norm="frozen")
    adapter.check_reach(x)
    assert model.training
    adapter.detach()
    assert model.norm.training


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own, at a break
@pytest.mark.parametrize("how", ["layer", "forward", "broken graph"])
def test_a_call_that_is_partly_compiled(how: str):
    """The layer's call runs eagerly and its forward compiled, or the reverse: the update is added once."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = Both().double(), torch.randn(3, 6, dtype=torch.float64)
    perturb(attach(model, PiSSA(rank=2)))
    expected = model(x)
    run = model
    if how == "layer":
        model.layer.compile(backend="eager")
    elif how == "forward":
        model.layer.forward = torch.compile(model.layer.forward, backend="eager")
    else:
        model.layer.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
        run = torch.compile(model, backend="eager")
    for _ in range(2):
        close(run(x), expected)


def test_fully_sharded():
    """FSDP2 in one process: the sharded model gives the same output and every factor its gradient."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(6, 18, bias=False), nn.Linear(6, 6)
            self.w = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = nn.functional.linear(x, self.qkv.weight).chunk(3, -1)
            return self.proj(torch.softmax(q @ k.mT, -1) @ v) + x @ self.w @ self.w.mT

    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    adapter = attach(model, PiSSA(rank=2), targets=["qkv[q,v]", "proj", "w[in,out]"])
    perturb(adapter)
    expected = model(x).detach()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for block in model:
            fully_shard(block)
        fully_shard(model)
        out = model(x)
        close(out.detach(), expected)
        out.sum().backward()
        assert all(p.grad is not None for p in adapter.parameters())
    finally:
        dist.destroy_process_group()


def test_base_weights_come_back_after_all_of_it():
    model, x = stack()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    one = attach(model, PiSSA(rank=2))
    two = attach(model, SVFT(), name="two")
    for adapter in (one, two):
        perturb(adapter)
    expected = model(x)
    one.merge()
    two.fold()
    close(model(x), expected)
    one.detach()
    two.detach()
    assert all(equal_bits(p, base[name]) for name, p in model.named_parameters())
