"""Tensors that several sites share: made once, trained once, saved once, and still shared whatever happens to them."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from damage import header_of, put
from helpers import equal_bits, perturb, refused
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import svdpeft
from svdpeft import CheckpointError, FRoD, LoRA, PiCa, RandLoRA, TinyLoRA, VeRA, attach, load
from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.loading import restore
from svdpeft.compare import budget
from svdpeft.methods.base import Given, Method

METHODS = [
    VeRA(rank=3),
    RandLoRA(rank=2, alpha=2.0),
    PiCa(rank=2),
    TinyLoRA(u=3, tie="all"),
    TinyLoRA(u=3, tie=2),
    TinyLoRA(u=3, tie="type"),
    FRoD(density=0.3),
]
every_sharing = pytest.mark.parametrize("method", METHODS, ids=str)
TRAINED = [m for m in METHODS if isinstance(m, (PiCa, TinyLoRA))]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 8, dtype=torch.float64)
        self.down = nn.Linear(8, 5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def net(seed: int = 0, depth: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(Block() for _ in range(depth)))


def batch() -> Tensor:
    return torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def ties(adapter: Adapter) -> dict[str, list[set[str]]]:
    """For every shared name the sets of sites that hold one and the same object."""
    found: dict[str, dict[int, set[str]]] = {}
    for name, site in adapter.sites.items():
        for role in site.factors.tied:
            found.setdefault(role, {}).setdefault(id(getattr(site.factors, role)), set()).add(name)
    return {role: sorted(groups.values(), key=min) for role, groups in found.items()}


def storages(adapter: Adapter) -> int:
    """Number of different memories that the tensors of all sites lie in."""
    return len({t.data_ptr() for site in adapter.sites.values() for t in site.factors.tensors().values() if t.numel()})


# -- what is shared ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (VeRA(rank=3), {"A": [6], "B": [6]}),
        (VeRA(rank={"up": 3, ".*": 4}), {"A": [3, 3], "B": [3, 3]}),
        (RandLoRA(rank=2), {"A": [6], "B": [6]}),
        (PiCa(rank=2), {"L": [3, 3]}),
        (PiCa(rank={"0.up": 3, ".*": 2}), {"L": [3, 1, 2]}),
        (PiCa(rank=2, tied=False), {}),
        (TinyLoRA(), {}),
        (TinyLoRA(tie="all"), {"v": [6]}),
        (TinyLoRA(tie="all", rank={"up": 1, ".*": 2}), {"v": [6]}),
        (TinyLoRA(tie="type"), {"v": [3, 3]}),
        (TinyLoRA(tie=4), {"v": [4, 2]}),
        (FRoD(), {"V": [3, 3], "index": [3, 3]}),
    ],
    ids=str,
)
def test_groups(method: Method, expected: dict[str, list[int]]):
    adapter = attach(net(), method)
    assert {role: [len(group) for group in groups] for role, groups in ties(adapter).items()} == expected


def test_consecutive_sites_are_those_of_the_model():
    adapter = attach(net(), TinyLoRA(tie=2))
    assert ties(adapter)["v"] == [{"0.up", "0.down"}, {"1.up", "1.down"}, {"2.up", "2.down"}]


@every_sharing
def test_integers_are_buffers_and_the_rest_parameters(method: Method):
    for site in attach(net(), method).sites.values():
        f = site.factors
        for role in f.tied:
            held = f._parameters if getattr(f, role).is_floating_point() else f._buffers
            assert role in held
            assert getattr(f, role).requires_grad == (role in method.trains)


@every_sharing
def test_each_value_is_counted_and_named_once(method: Method):
    model = net()
    adapter = attach(model, method)
    parameters = list(adapter.parameters())
    assert len(parameters) == len({id(p) for p in parameters})
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter.trainable_count
    names = [name for name, _ in adapter.named_parameters()]
    assert len(names) == len(set(names))
    sites = budget.sites_of(model, method, ["all-linear"], [])
    assert method.total(sites) == adapter.trainable_count
    shared = sum(p.numel() for r, p in {id(p): (r, p) for r, p in trained_ties(adapter)}.values() if r)
    assert adapter.trainable_count == sum(site.count for site in adapter.sites.values()) + shared
    for site in adapter.sites.values():
        assert site.count == site.method.count(*site.shape)


def trained_ties(adapter: Adapter) -> list[tuple[str, Tensor]]:
    pairs = [(r, getattr(s.factors, r)) for s in adapter.sites.values() for r in s.factors.tied]
    return [(role, p) for role, p in pairs if p.requires_grad]


def test_summary_says_what_is_shared():
    adapter = attach(net(), PiCa(rank=2))
    rows = [line.split() for line in adapter.summary().splitlines()]
    assert ["L", "of", "3", "sites", "8x2", "shared", "PiCa(rank=2)", "16"] in rows
    assert ["L", "of", "3", "sites", "5x2", "shared", "PiCa(rank=2)", "10"] in rows
    assert any(row[:1] == ["total"] and row[-1] == "26" for row in rows)
    assert "shared" not in attach(net(), VeRA(rank=3)).summary()  # nothing that trains is


@pytest.mark.parametrize("method", TRAINED, ids=str)
def test_gradient_is_the_sum_over_the_sites(method: Method):
    model, x = net(), batch()
    adapter = attach(model, method)
    perturb(adapter)
    weights = torch.randn(4, 5, dtype=torch.float64)
    (model(x) * weights).sum().backward()
    tied = {id(p): (role, p) for role, p in trained_ties(adapter)}
    expected = {key: torch.zeros_like(p) for key, (_, p) in tied.items()}
    for site in adapter.sites.values():  # the same model with a copy of its own in each site
        for role in site.factors.tied:
            if (shared := getattr(site.factors, role)).requires_grad:
                own = nn.Parameter(shared.detach().clone())
                site.factors.register_parameter(role, own)
                (grad,) = torch.autograd.grad((model(x) * weights).sum(), own)
                expected[id(shared)] += grad
                site.factors.register_parameter(role, shared)
    for key, (_, p) in tied.items():
        torch.testing.assert_close(p.grad, expected[key])


@pytest.mark.parametrize("method", TRAINED, ids=str)
def test_an_optimizer_steps_a_shared_parameter_once(method: Method):
    model, x = net(), batch()
    adapter = attach(model, method)
    perturb(adapter)
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    for name, p in adapter.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * p.grad)


@every_sharing
def test_two_adapters_share_nothing_and_leave_one_by_one(method: Method):
    for first in (0, 1):
        model, x = net(), batch()
        model.requires_grad_(False)
        base = model(x)
        adapters = [attach(model, method), attach(model, method, name="two")]
        held = [
            {id(t) for s in a.sites.values() for t in s.factors.state_dict(keep_vars=True).values()} for a in adapters
        ]
        assert held[0].isdisjoint(held[1])
        for i, adapter in enumerate(adapters):
            perturb(adapter, seed=i)
        with adapters[first].disabled():
            expected = model(x)
        adapters[first].detach()
        torch.testing.assert_close(model(x), expected)
        adapters[1 - first].detach()
        assert torch.equal(model(x), base)
        assert not any("svdpeft" in name for name in model.state_dict())


@every_sharing
def test_permanent_merge(method: Method):
    model, x = net(), batch()
    adapter = attach(model, method)
    perturb(adapter)
    expected = model(x)
    adapter.merge(permanent=True)
    torch.testing.assert_close(model(x), expected)
    assert model.state_dict().keys() == net().state_dict().keys()


# -- files ---------------------------------------------------------------------------------------------------


@every_sharing
def test_a_file_holds_a_shared_tensor_once_and_loading_ties_it(method: Method, tmp_path: Path):
    model, x = net(), batch()
    adapter = attach(model, method)
    perturb(adapter)
    expected, tied, names = model(x), ties(adapter), [n for n, _ in adapter.named_parameters()]
    adapter.save(tmp_path / "a", bases="stored")
    saved = load_file(tmp_path / "a" / "adapter.safetensors")
    for role, groups in tied.items():
        assert sum(key.endswith(f"/{role}") for key in saved) == len(groups)
    other = net()
    for folder in ("a", "b"):  # saved again after loading
        again = load(other, tmp_path / folder)
        assert torch.equal(other(x), expected)
        assert ties(again) == tied
        assert [n for n, _ in again.named_parameters()] == names
        assert again.trainable_count == adapter.trainable_count
        assert [s.count for s in again.sites.values()] == [s.count for s in adapter.sites.values()]
        assert storages(again) == storages(adapter)
        again.save(tmp_path / "b")
        assert (tmp_path / "b" / "adapter.json").read_text() == (tmp_path / "a" / "adapter.json").read_text()
        again_saved = load_file(tmp_path / "b" / "adapter.safetensors")
        assert saved.keys() == again_saved.keys()
        assert all(equal_bits(saved[key], again_saved[key]) for key in saved)
        again.detach()


@every_sharing
def test_training_goes_on_from_a_file(method: Method, tmp_path: Path):
    model, x = net(), batch()
    adapter = attach(model, method)
    perturb(adapter)
    adapter.save(tmp_path / "a")
    expected, tied = model(x), ties(adapter)
    perturb(adapter, seed=4)
    restore(adapter, tmp_path / "a")
    assert torch.equal(model(x), expected)
    assert ties(adapter) == tied
    twin = net()
    both = load(twin, tmp_path / "a")
    for a, m in ((adapter, model), (both, twin)):
        optimizer = torch.optim.SGD(a.parameters(), lr=0.01)
        m(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(model(x), twin(x))


def test_a_file_with_a_wrong_tie_is_refused(tmp_path: Path):
    adapter = attach(net(), PiCa(rank=2))
    adapter.save(tmp_path / "a")
    header = header_of(tmp_path / "a")
    good = json.dumps(header)
    for site, holder, words in (
        ("1.up", "9.up", ["damaged"]),  # no such site
        ("0.up", "1.up", ["damaged"]),  # a later one
        ("1.up", "0.down", ["1.up"]),  # of another shape
    ):
        header = json.loads(good)
        header["sites"][site]["tied"]["L"] = holder
        put(tmp_path / "a", json.dumps(header))
        model = net()
        with refused(model, *words, error=CheckpointError):
            load(model, tmp_path / "a")
    put(tmp_path / "a", good)
    tensors = load_file(tmp_path / "a" / "adapter.safetensors")
    del tensors["0.up/L"]
    save_file(tensors, tmp_path / "a" / "adapter.safetensors")
    model = net()
    with refused(model, "0.up/L", "missing", error=CheckpointError):
        load(model, tmp_path / "a")


# -- copies and conversions ----------------------------------------------------------------------------------


def through_torch_save(pair: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@every_sharing
@pytest.mark.parametrize("how", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p)), through_torch_save])
def test_a_copy_is_tied_in_itself_and_to_nothing_else(method: Method, how: Any):
    model, x = net(), batch()
    adapter = attach(model, method)
    perturb(adapter)
    expected = model(x)
    twin, twin_adapter = how((model, adapter))
    assert ties(twin_adapter) == ties(adapter)
    assert storages(twin_adapter) == storages(adapter)
    assert torch.equal(twin(x), expected)
    perturb(twin_adapter, seed=2)
    assert torch.equal(model(x), expected)
    assert not torch.equal(twin(x), expected)


@every_sharing
def test_a_cast_keeps_the_ties(method: Method):
    model, x = net(), batch()
    adapter = attach(model, method)
    perturb(adapter)
    tied, expected = ties(adapter), model(x)
    model.to(torch.float32)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    torch.testing.assert_close(model(x.float()).double(), expected, rtol=1e-4, atol=1e-4)
    model.to(torch.float64)
    assert ties(adapter).keys() == tied.keys()
    assert [list(map(len, g)) for g in ties(adapter).values()] == [list(map(len, g)) for g in tied.values()]


def test_a_move_keeps_the_ties_of_integers(tmp_path: Path):
    """A move gives each module's buffer new memory; parameters keep theirs in common by torch's own doing."""
    adapter = attach(net(), FRoD(density=0.3))
    adapter.save(tmp_path / "a")
    for each in (adapter, load(net(), tmp_path / "a"), copy.deepcopy((adapter, adapter.model))[0]):
        tied = ties(each)["index"]
        each.model.to("meta")
        assert ties(each)["index"] == tied
        assert {site.factors.index.device.type for site in each.sites.values()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_sharing
def test_a_move_to_a_gpu_keeps_the_ties(method: Method):
    model, x = net(), batch()
    adapter = attach(model, method)
    perturb(adapter)
    tied, expected, number = ties(adapter), model(x), storages(adapter)
    model.cuda()
    torch.testing.assert_close(model(x.cuda()).cpu(), expected)
    assert [[len(g) for g in groups] for groups in ties(adapter).values()] == [
        [len(g) for g in t] for t in tied.values()
    ]
    assert storages(adapter) == number
    later = attach(net().cuda(), method)  # made there
    assert {t.device.type for s in later.sites.values() for t in s.factors.tensors().values()} == {"cuda"}
    for role, groups in ties(later).items():
        assert [len(g) for g in groups] == [len(g) for g in tied[role]]
    for name, site in attach(net(), method).sites.items():
        for role, t in site.factors.tensors().items():
            torch.testing.assert_close(later.sites[name].factors.tensors()[role].cpu(), t)


@every_sharing
def test_state_dict(method: Method):
    model, x = net(), batch()
    adapter = attach(model, method)
    perturb(adapter)
    expected = model(x)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    twin = net(seed=5)
    twin_adapter = attach(twin, method, seed=8)
    perturb(twin_adapter, seed=3)
    tied = ties(twin_adapter)
    twin.load_state_dict(state)
    assert torch.equal(twin(x), expected)
    assert ties(twin_adapter) == tied


def test_what_lies_on_two_devices_or_in_two_dtypes_is_not_shared():
    sites = [
        Given(name, (1, 6, 6), 0, lambda: torch.zeros(6, 6), dtype=dtype, device=torch.device(device))
        for name, dtype, device in (
            ("a.q", torch.float32, "cpu"),
            ("b.q", torch.float32, "meta"),
            ("c.q", torch.float64, "cpu"),
            ("d.q", torch.float32, "cpu"),
        )
    ]
    assert PiCa(rank=2).total(sites) == 3 * 12  # a and d share
    model = net()
    model[1].float()
    adapter = attach(model, VeRA(rank=2))
    assert [len(g) for g in ties(adapter)["A"]] == [4, 2]
    model[1](batch().float())


# -- seeds ---------------------------------------------------------------------------------------------------

RANDOM = [VeRA(rank=3), RandLoRA(rank=2), RandLoRA(rank=2, bases="sparse"), FRoD(density=0.3)]


def drawn(adapter: Adapter, site: str) -> dict[str, Tensor]:
    """What a site uses of the shared random tensors."""
    f, (_, m, n) = adapter.sites[site].factors, adapter.sites[site].shape
    if isinstance(adapter.methods[0], VeRA):
        return {"A": f.A[:, :n] * f.A.shape[1] ** 0.5, "B": f.B[:m]}
    if isinstance(adapter.methods[0], RandLoRA):
        return {"A": f.A[:, : min(m, n)], "B": f.B[: max(m, n), : f.Lambda.shape[-2]]}
    return {"index": f.index}


@pytest.mark.parametrize("method", RANDOM, ids=str)
def test_random_numbers_follow_the_seed_and_not_the_other_sites(method: Method):
    """Up to VeRA's fan-in, the largest n, by which A is scaled."""
    alone = attach(net(depth=1), method, seed=3)
    more = net(depth=3)
    more.append(nn.Linear(5, 40, dtype=torch.float64)).append(nn.Linear(40, 30, dtype=torch.float64))
    crowd = attach(more, method, seed=3)
    backwards = attach(nn.ModuleDict(reversed(list(net(depth=1)[0].named_children()))), method, seed=3)
    other = attach(net(depth=1), method, seed=4)
    for site in ("0.up", "0.down"):
        for role, expected in drawn(alone, site).items():
            torch.testing.assert_close(drawn(crowd, site)[role], expected, rtol=1e-12, atol=0)
            assert not torch.equal(drawn(other, site)[role], expected)
            if not isinstance(method, FRoD):  # there the name of the block is part of the module's type
                assert torch.equal(drawn(backwards, site.partition(".")[2])[role], expected)


@pytest.mark.parametrize("method", RANDOM, ids=str)
def test_the_global_random_state_is_left_alone_and_not_asked(method: Method):
    found = []
    for seed in (0, 1):
        model = net()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append({name: site.factors.tensors() for name, site in attach(model, method).sites.items()})
        assert torch.equal(torch.get_rng_state(), state)
    for name, tensors in found[0].items():
        assert all(equal_bits(tensor, found[1][name][role]) for role, tensor in tensors.items())


def test_vera_depends_on_the_largest_layer_in_one_factor_only():
    small, large = net(depth=1), nn.Sequential(Block(), nn.Linear(20, 4, dtype=torch.float64))
    a, b = (attach(model, VeRA(rank=3)).sites["0.up"].factors for model in (small, large))
    torch.testing.assert_close(a.A[:, :5] * (8 / 20) ** 0.5, b.A[:, :5], rtol=1e-12, atol=0)
    assert torch.equal(a.B[:5], b.B[:5])


def test_frod_does_not_depend_on_the_order_of_the_layers():
    layers = {}
    for name in "012":
        layers[name] = nn.Linear(6, 9, dtype=torch.float64)
    found = []
    for order in ("012", "201"):
        adapter = attach(nn.ModuleDict({name: copy.deepcopy(layers[name]) for name in order}), FRoD(), seed=1)
        assert len(ties(adapter)["V"]) == 1
        found.append({name: site.factors.tensors() for name, site in adapter.sites.items()})
    for name, tensors in found[0].items():
        assert all(equal_bits(t, found[1][name][role]) for role, t in tensors.items())


# -- budget --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, TinyLoRA(), PiCa(tied=False)], ids=str)
def test_a_budget_is_kept_and_used(method: Method):
    model = net()
    sites = budget.sites_of(model, method, ["all-linear"], [])
    values = method.knob_values(sites)
    counts = [method.turned(value).total(sites) for value in values]
    assert counts == sorted(counts)
    for limit in (counts[0], counts[0] + 7, counts[len(counts) // 2], counts[-1], counts[-1] + 1000):
        fitted = budget.fit(method, limit, sites)
        assert fitted.total(sites) == max(c for c in counts if c <= limit)
        adapter = attach(model, fitted, clip_rank=True)
        assert adapter.trainable_count == fitted.total(sites)
        adapter.detach()
    with pytest.raises(ValueError, match="over the budget"):
        budget.fit(method, counts[0] - 1, sites)


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TinyLoRA(tie=0), ["tie 0", "1: each its own"]),
        (lambda: TinyLoRA(tie="depth"), ["'depth'", "'type'"]),
        (lambda: TinyLoRA(u=0), ["u 0"]),
        (lambda: TinyLoRA(split="right"), ["'right'"]),
        (lambda: VeRA(d_initial=0.0), ["d_initial"]),
        (lambda: RandLoRA(bases="sparsest"), ["'sparsest'", "very-sparse"]),
        (lambda: RandLoRA(gamma="one"), ["'one'"]),
        (lambda: FRoD(rank=3), ["rank 3", "density"]),
        (lambda: FRoD(density=1.5), ["1.5"]),
        (lambda: FRoD(ridge=0.0), ["ridge"]),
    ],
)
def test_bad_hyper_parameters(make: Any, words: list[str]):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert all(word in str(caught.value) for word in words)


def test_a_rank_may_exceed_the_matrix_only_where_the_method_says_so():
    model = net()
    assert attach(model, VeRA(rank=100)).sites["0.up"].method.rank == 100
    with pytest.raises(ValueError, match=r"rank 6 is outside \[1, 5\] at 0.up"):
        attach(net(), PiCa(rank=6))
    assert attach(net(), PiCa(rank=6), clip_rank=True).sites["0.up"].method.rank == 5
    with pytest.raises(ValueError, match="rank 0 is outside"):
        attach(net(), VeRA(rank=0))


def test_frod_refuses_a_weight_of_zeros():
    model = net()
    with torch.no_grad():
        model[1].up.weight.zero_()
    with refused(model, "1.up", "all zero"):
        attach(model, FRoD())


def test_sharing_methods_beside_others_in_one_model():
    model, x = net(), batch()
    adapter = attach(model, targets={"0.up": PiCa(rank=2), "up": PiCa(rank=2), "0.down": LoRA(rank=1), "down": VeRA()})
    assert ties(adapter) == {"L": [{"0.up", "1.up", "2.up"}], "A": [{"1.down", "2.down"}], "B": [{"1.down", "2.down"}]}
    perturb(adapter)
    model(x).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_sites_of_another_rule_do_not_count_when_consecutive_sites_are_tied():
    """TinyLoRA(tie=2) beside LoRA: pairs of its own sites, as without the other rule."""
    blocks = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(6, 5), "v": nn.Linear(6, 5)}) for _ in range(4)])
    alone = attach(blocks, TinyLoRA(u=3, tie=2), ["q"])
    assert alone.trainable_count == 6
    alone.detach()
    both = attach(blocks, targets={"q": TinyLoRA(u=3, tie=2), "v": LoRA(rank=1)})
    assert both.trainable_count == 6 + 4 * 11


def test_a_stock_trainer_that_would_save_shared_tensors_is_refused(tmp_path: Path):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5))
    adapter = attach(model, VeRA(rank=2), ["0", "1"])
    callback = svdpeft.AdapterCallback(adapter)
    args = transformers.TrainingArguments(str(tmp_path), save_strategy="steps", use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=r"0 shares tensors between sites or layers, .* use svdpeft\.Trainer"):
        callback.on_train_begin(args, transformers.TrainerState(), transformers.TrainerControl())
