"""The invariants: every method × every layer kind, by the registries. A new file in either becomes new rows."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import operator
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    Host,
    adapt,
    assert_same,
    called,
    close,
    close_to_rounding,
    defined,
    differs,
    equal_bits,
    every_called,
    every_factored,
    every_kind,
    every_method,
    exact_change,
    example,
    expected_of,
    frozen,
    host,
    kinds,
    label,
    magnitude,
    methods,
    paths,
    perturb,
    snapshot,
    terms,
    updated,
    weight_of,
    weights_of,
)
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from svdpeft import SVFT, LoRA, attach, load
from svdpeft.compare.budget import sites_of
from svdpeft.decomposition import Product, exact_rank, recompress
from svdpeft.interop.peft import export_ranks
from svdpeft.methods.base import Factored, Method, PerSite, Transform
from svdpeft.methods.dora import DoRA
from svdpeft.registry import KINDS, METHODS
from svdpeft.sites.weights import stored

HALVES = (torch.float32, torch.bfloat16)


def widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


LINEAR = ("linear", 0)
READ = ("rwkv", 0)  # an example whose weights are read


def test_every_registered_method_and_kind_has_rows():
    assert {m.name for m in methods()} == {name for name in METHODS if not getattr(METHODS[name], "pairs", ())}
    assert {name for name, _ in kinds()} == set(KINDS)


def test_examples_show_matrices_that_are_not_square():
    for name in KINDS:
        shapes = set()
        for kind in (kind for kind in kinds() if kind[0] == name):
            model, _ = host(kind)
            shapes |= {site.shape[1:] for site in adapt(model, LoRA(rank=1)).sites.values()}
        assert any(m != n for m, n in shapes), f"{name} is {shapes}: a transposition would pass unseen"


# -- 1 the start ---------------------------------------------------------------------------------------------


@every_kind
@every_method
def test_start_is_the_base_bit_for_bit(method: Method, kind: tuple[str, int]):
    for dtype in (torch.float64, *HALVES):
        model, x = host(kind, dtype=dtype)
        expected = frozen(model, x)
        adapter = adapt(model, method)
        exact = all(site.method.exact_start for site in adapter.sites.values())
        wide = dtype == torch.float64  # elsewhere a small step off the base may be rounded away
        assert torch.equal(frozen(model, x), expected) == exact or not (exact or wide)
        for site in adapter.sites.values():
            assert bool((site.delta() == 0).all()) == exact
            name = weight_of(model, site)
            read = operator.attrgetter(name)(model)  # what the model's own code gets
            assert torch.equal(read, weights_of(model, adapter)[name]) == exact or not (exact or wide)


# -- 2 disabled and detached ---------------------------------------------------------------------------------


@every_kind
@every_method
def test_disabled_and_detached_are_the_base(method: Method, kind: tuple[str, int]):
    model, x = host(kind)
    before, expected = snapshot(model), frozen(model, x)
    values = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = adapt(model, method, train=("head",))
    perturb(adapter)
    model.train()(x)  # changes the running statistics
    adapted = model.eval()(x)
    assert differs(adapted, expected)
    for change, back in ((None, None), ("merge", "unmerge"), ("fold", "unfold")):
        if change:
            getattr(adapter, change)()
        with adapter.disabled(), torch.no_grad():
            assert torch.equal(frozen(model, x), expected)
            assert all(equal_bits(model.state_dict()[k], v) for k, v in values.items())
        close(model(x), adapted)
        if back:
            getattr(adapter, back)()
    assert torch.equal(model(x), adapted)
    adapter.detach()
    assert_same(before, snapshot(model))
    assert torch.equal(frozen(model, x), expected)


@every_kind
@every_factored
@pytest.mark.parametrize("state", ["attached", "merged", "folded"])
def test_two_adapters_leave_in_any_order(method: Method, kind: tuple[str, int], state: str):
    for first_out in (0, 1):
        model, x = host(kind)
        before = snapshot(model)
        one = adapt(model, method, train=("head",))
        two = adapt(model, LoRA(rank=1), name="two", seed=1)
        for adapter in (one, two):
            perturb(adapter)
        model.train()(x)
        model.eval()
        expected = model(x)
        for adapter in (one, two):
            if state != "attached":
                getattr(adapter, {"merged": "merge", "folded": "fold"}[state])()
        close(model(x), expected)
        for adapter in (one, two) if first_out == 0 else (two, one):
            adapter.detach()
            model.train()(x)  # the one that stays still owns the running statistics
            model.eval()
            if not hasattr(model, "_svdpeft"):
                model.norm.load_state_dict(dict(model.norm.state_dict().items()))
        # the last train-mode forward ran on the bare base: only then may statistics differ
        after = snapshot(model)
        for key in before:
            if key != "norm":
                assert before[key] == after[key], key


def test_running_statistics_return_when_the_first_of_two_adapters_leaves_first():
    model, x = host(LINEAR)
    before = snapshot(model)
    one, two = adapt(model, LoRA(rank=1)), adapt(model, LoRA(rank=1), name="two")
    model.train()(x)
    one.detach()
    model(x)
    model.eval()
    two.detach()
    assert_same(before, snapshot(model))


@every_method
def test_nested_disabled_is_still_the_base(method: Method):
    model, x = host(LINEAR)
    expected = model(x)
    adapter = adapt(model, method, train=("head",))
    perturb(adapter)
    adapted = model(x)
    with adapter.disabled():
        with adapter.disabled():
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), adapted)


def test_disabled_ends_when_the_block_raises():
    model, x = host(LINEAR)
    adapter = adapt(model, LoRA(rank=2))
    perturb(adapter)
    adapted = model(x)
    with pytest.raises(KeyError), adapter.disabled():
        raise KeyError
    assert torch.equal(model(x), adapted)


# -- 3 merging -----------------------------------------------------------------------------------------------


@every_kind
@every_factored
def test_merged_is_adapted_and_every_bit_returns(method: Method, kind: tuple[str, int]):
    model, x = host(kind)
    adapter = adapt(model, method)
    base = {name: w.clone() for name, w in weights_of(model, adapter).items()}
    perturb(adapter)
    adapted = model.layer(x)
    assert differs(adapted, expected_of(kind, x, {}, layer=True))
    new = updated(model, adapter)
    close(adapted.detach(), expected_of(kind, x, new, layer=True))
    report = adapter.merge()
    close(model.layer(x), adapted)
    for name, w in weights_of(model, adapter).items():
        close(w.detach(), new[name])
    assert report.worst < 1e-12
    adapter.unmerge()
    for _ in range(10):
        adapter.merge()
        adapter.unmerge()
    assert all(equal_bits(w, base[name]) for name, w in weights_of(model, adapter).items())
    assert torch.equal(model.layer(x), adapted)


@every_kind
@every_factored
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_low_precision_weight_is_rounded_once(method: Method, kind: tuple[str, int], dtype: torch.dtype):
    """What is read and what is merged is W0 + ΔW, formed in float32 at least, to within one rounding."""
    model, _ = host(kind, dtype=dtype)
    adapter = adapt(model, method)
    base = {name: w.clone() for name, w in weights_of(model, adapter).items()}
    perturb(adapter)
    size = {name: w.detach().double().abs() for name, w in base.items()}
    for site in adapter.sites.values():
        size[weight_of(model, site)] += site.kind.from_matrix(site.places[0].module, terms(site))
    exact = {name: w.double() for name, w in base.items()}
    for site in adapter.sites.values():
        exact[weight_of(model, site)] += site.kind.from_matrix(site.places[0].module, exact_change(site))
    for state in ("attached", "merge", "fold"):
        if state != "attached":
            getattr(adapter, state)()
        for name in base:
            close_to_rounding(operator.attrgetter(name)(model).detach(), exact[name], size[name], dtype)
        if state != "attached":
            getattr(adapter, f"un{state}")()
    for _ in range(10):
        adapter.merge()
        adapter.unmerge()
    assert all(equal_bits(w, base[name]) for name, w in weights_of(model, adapter).items())


@every_called
@every_factored
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_low_precision_within_rounding(method: Method, kind: tuple[str, int], dtype: torch.dtype):
    """Adapted, merged and folded outputs against the float64 layer; ten cycles give every bit back."""
    model, x = host(kind, dtype=dtype)
    found, layer = KINDS[kind[0]](), model.layer
    base, adapter = stored(layer, "weight").clone(), adapt(model, method)
    perturb(adapter)
    site = adapter.sites["layer"]
    wide = copy.deepcopy(layer).double()
    for name in ("_svdpeft_places", "_svdpeft_hook"):
        delattr(wide, name)
    wide.__class__ = type(wide).__mro__[1]
    wide._forward_hooks.clear()
    wide._forward_hooks_with_kwargs.clear()
    exact = found.add_bias(wide, found.run(wide, widened(x), base.double() + site.delta().double()))
    size = magnitude(found, wide, x, base, site)
    close_to_rounding(layer(x), exact, size, dtype)
    adapter.merge()
    close_to_rounding(layer(x), exact, size, dtype)
    adapter.unmerge()
    adapter.fold()
    close_to_rounding(layer(x), exact, size, dtype)
    adapter.unfold()
    for _ in range(10):
        adapter.merge()
        adapter.unmerge()
    assert equal_bits(stored(layer, "weight"), base)


@every_kind
@every_factored
def test_two_adapters_add_up_and_switch_off_alone(method: Method, kind: tuple[str, int]):
    model, x = host(kind)
    base = frozen(model.layer, x)
    one, two = adapt(model, method), adapt(model, LoRA(rank=1), name="two", seed=9)
    weights = {name: w.clone() for name, w in weights_of(model, one).items()}
    perturb(one)
    perturb(two, seed=8)
    both = model.layer(x)
    with two.disabled():
        first = model.layer(x)
        close(first.detach(), expected_of(kind, x, updated(model, one), layer=True))
    with one.disabled():
        second = model.layer(x)
    assert differs(first, base)
    assert differs(second, base)
    total = updated(model, one)
    for name, w in updated(model, two).items():
        total[name] = total[name] + (w - weights[name])
    close(both.detach(), expected_of(kind, x, total, layer=True))
    with one.disabled(), two.disabled():
        assert torch.equal(frozen(model.layer, x), base)

    def unchanged() -> bool:
        return all(equal_bits(w, weights[name]) for name, w in weights_of(model, one).items())

    for into, back in (("merge", "unmerge"), ("fold", "unfold")):
        for order in ((one, two), (two, one)):
            for undo in ((one, two), (two, one)):
                for adapter in order:
                    getattr(adapter, into)()
                    close(model.layer(x), both)
                for adapter in undo:
                    getattr(adapter, back)()
                    close(model.layer(x), both)
                assert unchanged()
    for first_state, second_state in (("fold", "merge"), ("merge", "fold")):
        getattr(one, first_state)()
        getattr(two, second_state)()
        close(model.layer(x), both)
        with one.disabled():
            close(model.layer(x), second)
        with two.disabled():
            close(model.layer(x), first)
        getattr(one, f"un{first_state}")()
        close(model.layer(x), both)
        getattr(two, f"un{second_state}")()
        assert unchanged()


@every_factored
@pytest.mark.parametrize("first", ["fold", "merge"])
@pytest.mark.parametrize("second", ["fold", "merge"])
def test_second_adapter_comes_while_the_first_is_folded_or_merged(method: Method, first: str, second: str):
    model, x = host(LINEAR)
    weight = stored(model.layer, "weight").clone()
    reference, _ = host(LINEAR)
    for name, m in (("one", method), ("two", METHODS["pissa"](rank=2))):
        perturb(adapt(reference, m, name=name))
    expected = reference.layer(x)
    one = adapt(model, method, name="one")
    perturb(one)
    getattr(one, first)()
    two = adapt(model, METHODS["pissa"](rank=2), name="two")  # decomposes the base, not what is written over it
    perturb(two)
    close(model.layer(x), expected)
    getattr(two, second)()
    close(model.layer(x), expected)
    one.detach()
    two.detach()
    assert equal_bits(stored(model.layer, "weight"), weight)


@every_factored
def test_permanent_merge_leaves_a_plain_model(method: Method):
    model, x = host(LINEAR)
    structure = snapshot(model)
    adapter = adapt(model, method)
    perturb(adapter)
    adapted = model(x)
    adapter.merge(permanent=True)
    close(model(x), adapted)
    after = snapshot(model)
    for part in (structure, after):
        part["layer"]["parameters"]["weight"] = part["layer"]["parameters"]["weight"][:2]  # all but the bits
    assert_same(structure, after)
    with pytest.raises(RuntimeError, match="detached"):
        adapter.unmerge()


@every_factored
@pytest.mark.parametrize("state", ["attached", "merge", "fold"])
def test_permanent_merge_beside_another_adapter(method: Method, state: str):
    model, x = host(LINEAR)
    one, two = adapt(model, LoRA(rank=2)), adapt(model, method, name="two")
    perturb(one)
    perturb(two)
    both = model.layer(x)
    with two.disabled():
        first = model.layer(x)
    if state != "attached":
        getattr(two, state)()
    if isinstance(method, Transform):  # its change depends on the weight below it
        with pytest.raises(ValueError, match="transforms the weight of layer"):
            one.merge(permanent=True)
        close(model.layer(x), both)
        two.merge(permanent=True) if two.state != "merged" else two.unmerge()
        close(model.layer(x), both)
        return
    one.merge(permanent=True)
    close(model.layer(x), both)
    if state != "attached":
        getattr(two, f"un{state}")()
        close(model.layer(x), both)
    two.detach()
    close(model.layer(x), first)


# -- 4 gradients ---------------------------------------------------------------------------------------------


@every_kind
@every_method
def test_gradients_reach_exactly_what_trains(method: Method, kind: tuple[str, int]):
    model, x = host(kind)
    adapter = adapt(model, method, train=("head.bias",))
    perturb(adapter)
    trained = {id(p): name for name, p in adapter.named_parameters()}
    assert all(p.requires_grad for p in adapter.parameters())
    model.train()(x).square().sum().backward()
    for name, p in model.named_parameters():
        if id(p) in trained:
            assert p.grad is not None, f"no gradient at {name}"
            assert bool((p.grad != 0).any()), f"no gradient at {name}"
        else:
            assert p.grad is None, f"a gradient at {name}"
            assert not p.requires_grad
    for name, site in adapter.sites.items():
        own = set(site.method.trains) - set(site.factors.tied)  # what is tied goes by the name of the first site
        assert {f"{name}/{role}" for role in own} <= set(trained.values())
    assert {id(p) for p in shared_of(adapter)} <= trained.keys()
    assert "head.bias" in trained.values()
    assert adapter.trainable_count == sum(p.numel() for p in model.parameters() if p.requires_grad)


@every_kind
@every_factored
def test_hook_has_the_gradient_of_its_output(method: Method, kind: tuple[str, int]):
    """In place or not, autograd's gradients equal finite differences, in the input and in every factor."""
    model, x = host(kind)
    if isinstance(method, DoRA):  # the paper leaves the norm's part out of the gradient: see the oracles
        method = dataclasses.replace(method, norm_gradient=True)
    adapter = adapt(model, method)
    perturb(adapter)
    inputs = [x[:1].requires_grad_()] if x.is_floating_point() else []
    named = dict(adapter.named_parameters())

    def run(*given: Tensor) -> Tensor:
        return model.layer(given[0] if inputs else x[:1])

    assert torch.autograd.gradcheck(run, (*inputs, *named.values()), fast_mode=True, atol=1e-6)


# -- 5 files -------------------------------------------------------------------------------------------------

READER = """
import json, sys, traceback, pathlib
import torch
from helpers import adapt, equal_bits, host, kinds, methods
import svdpeft
from svdpeft.decomposition import svd

torch.set_num_threads(1)
torch.manual_seed(987)
torch.rand(13)

def never(*args, **kwargs):
    raise AssertionError("something was decomposed at load")

svd.truncated_svd = never
torch.linalg.svd = torch.linalg.qr = torch.linalg.eigh = never
import svdpeft.methods.base
for module in list(sys.modules.values()):
    if getattr(module, "__name__", "").startswith("svdpeft") and hasattr(module, "truncated_svd"):
        module.truncated_svd = never
root = pathlib.Path(sys.argv[1])
wrong = {}
for row in json.loads((root / "rows.json").read_text()):
    try:
        folder = root / row["folder"]
        model, _ = host(tuple(row["kind"]))
        model.load_state_dict(torch.load(folder / "base.pt"))
        truth = torch.load(folder / "truth.pt")
        state = torch.get_rng_state()
        adapter = svdpeft.load(model, folder / "adapter")
        assert torch.equal(state, torch.get_rng_state()), "the random state was used"
        for name, site in adapter.sites.items():
            assert site.factors.tensors().keys() == truth["factors"][name].keys()
            for role, tensor in site.factors.tensors().items():
                assert equal_bits(tensor, truth["factors"][name][role]), (name, role)
        assert [n for n, _ in adapter.named_parameters()] == truth["trains"]
        assert [n for n, p in model.named_parameters() if p.requires_grad] == truth["flags"]
        assert equal_bits(model(truth["x"]), truth["out"]), "the output differs"
        assert [m.to_json() for m in adapter.methods] == truth["methods"]
        assert str(adapter) == truth["repr"]
        adapter.merge()
        assert equal_bits(model(truth["x"]), truth["merged"]), "the merged output differs"
    except Exception:
        wrong[row["folder"]] = traceback.format_exc()
(root / "wrong.json").write_text(json.dumps(wrong))
"""


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every adapter saved here and loaded in one new process; what went wrong there, by row."""
    root = tmp_path_factory.mktemp("files")
    rows: list[dict[str, Any]] = []
    for kind in kinds():
        for i, method in enumerate(methods()):
            if not defined(method, kind):
                continue
            folder = root / f"{label(kind)}-{i}"
            folder.mkdir()
            model, x = host(kind)
            torch.save(model.state_dict(), folder / "base.pt")
            adapter = adapt(model, method, train=("head.weight",))
            perturb(adapter)
            model.train()(x)
            model.eval()
            truth = {
                "factors": {name: site.factors.tensors() for name, site in adapter.sites.items()},
                "trains": [n for n, _ in adapter.named_parameters()],
                "flags": [n for n, p in model.named_parameters() if p.requires_grad],
                "methods": [m.to_json() for m in adapter.methods],
                "repr": str(adapter),
                "x": x,
                "out": model(x).detach(),
            }
            if i % 3:
                adapter.fold() if i % 2 else adapter.merge()  # what is saved does not depend on it
            adapter.save(folder / "adapter")
            if adapter.state == "folded":
                adapter.unfold()
            if adapter.state == "attached":
                adapter.merge()
            torch.save(truth | {"merged": model(x).detach()}, folder / "truth.pt")
            rows.append({"folder": folder.name, "kind": kind})
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "reader.py").write_text(READER)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, str(root / "reader.py"), str(root)], check=True, env=environment, timeout=1800)
    return json.loads((root / "wrong.json").read_text())


ROWS = [(i, kind) for kind in kinds() for i, method in enumerate(methods()) if defined(method, kind)]


@pytest.mark.xdist_group("files")  # one worker writes them for all rows
@pytest.mark.parametrize(("position", "kind"), ROWS, ids=[f"{label(methods()[i])}-{label(kind)}" for i, kind in ROWS])
def test_loaded_in_another_process_is_bit_identical(
    loaded_elsewhere: dict[str, str], position: int, kind: tuple[str, int]
):
    name = f"{label(kind)}-{position}"
    assert name not in loaded_elsewhere, loaded_elsewhere[name]


# -- 6 the factored path is the dense path -------------------------------------------------------------------


@every_called
@pytest.mark.parametrize("core", ["none", "diagonal", "matrix"])
def test_apply_equals_the_layer_with_the_dense_update(kind: tuple[str, int], core: str):
    found, layer, x = example(kind)
    *batch, m, n = found.to_matrix(layer, layer.weight.detach()).shape
    r = min(m, n) + 1  # a product may have more columns than the matrix has rows
    shapes = {"none": None, "diagonal": (*batch, r), "matrix": (*batch, r, r)}
    c = None if shapes[core] is None else torch.randn(shapes[core], dtype=torch.float64)  # type: ignore[arg-type]
    product = Product(torch.randn(*batch, m, r).double(), c, torch.randn(*batch, r, n).double(), scale=-1.7)
    delta = found.from_matrix(layer, product.dense())
    expected = found.run(layer, x, delta)
    close(found.apply(layer, x, product), expected)
    base = layer(x).detach()
    close(found.add(layer, x, base.clone(), product), base + expected)
    close(found.add_dense(layer, x, base.clone(), product), base + expected)
    close(found.add_bias(layer, found.run(layer, x, layer.weight)), layer(x))
    if core != "none":  # the dense form itself, without the library
        full = torch.diag_embed(c) if core == "diagonal" else c
        close(product.dense(), -1.7 * torch.einsum("...mr,...rs,...sn->...mn", product.L, full, product.A))
    out = base.clone()
    assert found.add(layer, x, out, product).data_ptr() == out.data_ptr(), "in place"


@every_called
def test_site_takes_the_same_values_by_either_path(kind: tuple[str, int]):
    """Three ways to one output: through the factors, through a dense ΔW, and by reading W0 + ΔW."""
    for method in (method for method in methods(True) if defined(method, kind)):
        model, x = host(kind)
        adapter = adapt(model, method)
        perturb(adapter)
        site = adapter.sites["layer"]
        outputs = []
        for dense in paths(site):
            site.dense = dense
            outputs.append(model.layer(x))
        site.places[0].can_call = False
        close(outputs[0], outputs[-1])
        close(model.layer(x), outputs[0])


# -- 7 ranks -------------------------------------------------------------------------------------------------


@every_kind
@every_factored
def test_rank_as_stated_before_training(method: Method, kind: tuple[str, int]):
    model, _ = host(kind)
    adapter = adapt(model, method)
    stated = {name: site.method.export_rank(*site.shape[1:]) for name, site in adapter.sites.items()}
    perturb(adapter)
    for name, site in adapter.sites.items():
        _batch, m, n = site.shape
        if stated[name] is None:  # of full rank: no LoRA can hold it
            assert site.method.product(site.factors) is None
            with pytest.raises(ValueError, match="full rank"):
                export_ranks(adapter)
            continue
        assert 1 <= stated[name] <= min(m, n)
        product = site.method.update(site.factors)
        dense = product.dense().detach()
        assert dense.shape[-2:] == (m, n)
        ranks = torch.linalg.matrix_rank(dense, rtol=1e-9)
        assert torch.equal(exact_rank(product), ranks)
        assert int(ranks.max()) <= stated[name]
        small = recompress(product)
        assert small.rank == max(int(ranks.max()), 1) <= stated[name]
        close(small.dense().detach(), dense)
        assert small.C is None
        assert small.scale == 1
        gram_left, gram_right = small.L.mT @ small.L, small.A @ small.A.mT
        close(gram_left.detach(), gram_right.detach())  # balanced: both are Σ


def shared_of(adapter: Any) -> list[Tensor]:
    """What trains and belongs to several sites, once per site."""
    tied = [getattr(site.factors, role) for site in adapter.sites.values() for role in site.factors.tied]
    return [p for p in tied if p.requires_grad]


@every_kind
@every_factored
def test_counts_are_the_formula(method: Factored, kind: tuple[str, int]):
    model, _ = host(kind)
    adapter = adapt(model, method)
    for site in adapter.sites.values():
        assert site.count == site.method.count(*site.shape)
    shared = {id(p): p.numel() for p in shared_of(adapter)}
    assert adapter.trainable_count == sum(site.count for site in adapter.sites.values()) + sum(shared.values())
    if not method.needs:  # without a calibration
        assert adapter.trainable_count == method.total(sites_of(model, method, model.targets, []))
    assert adapter.trainable_count == sum(p.numel() for p in model.parameters() if p.requires_grad)


# -- 8 the matrix view ---------------------------------------------------------------------------------------


@every_kind
def test_matrix_view_round_trips(kind: tuple[str, int]):
    """A site's matrices are its weight, and the sites of one weight are all of it, each entry once."""
    model, _ = host(kind)
    adapter = adapt(model, LoRA(rank=1))
    whole: dict[str, Tensor] = {}
    for site in adapter.sites.values():
        layer, kind_, name = site.places[0].module, site.kind, weight_of(model, site)
        w = model.get_parameter(name).detach() if called(kind) else layer._parameters[site.places[0].parameter].detach()
        matrix = kind_.to_matrix(layer, w)
        assert matrix.shape[-2:] == site.shape[1:]
        whole[name] = whole.get(name, 0) + kind_.from_matrix(layer, matrix)
        other = torch.randn(matrix.shape, dtype=torch.float64)
        assert equal_bits(kind_.to_matrix(layer, kind_.from_matrix(layer, other)), other)
    for name, w in whole.items():
        assert equal_bits(w, weights_of(model, adapter)[name])


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conv_matrix_acts_on_the_flattened_patch(groups: int, dims: int):
    """With the kernel as large as the input a convolution is one matrix product per group."""
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    space = (2, 3, 4)[:dims]
    layer = conv(6, 12, space, groups=groups, bias=False, dtype=torch.float64)
    matrix = KINDS["conv"]().to_matrix(layer, layer.weight.detach())
    x = torch.randn(5, 6, *space, dtype=torch.float64)
    by_group = x.reshape(5, groups, -1)
    close(layer(x).detach().reshape(5, groups, -1), torch.einsum("goi,ngi->ngo", matrix, by_group))


def test_linear_matrix_is_the_weight_and_the_transposed_one_of_gpt2():
    for kind in (("linear", 0), ("hf-conv1d", 0)):
        found, layer, x = example(kind)
        matrix = found.to_matrix(layer, layer.weight.detach())
        close(layer(x).detach(), x @ matrix.T + layer.bias.detach())


# -- 9 seeds -------------------------------------------------------------------------------------------------


def factors_of(adapter: Any) -> dict[str, dict[str, Tensor]]:
    return {name: site.factors.tensors() for name, site in adapter.sites.items()}


@every_kind
@every_factored
def test_same_seed_same_factors_whatever_the_global_state(method: Method, kind: tuple[str, int]):
    found = []
    for trial in range(2):
        model, _ = host(kind)
        torch.manual_seed(trial)
        state = torch.get_rng_state()
        found.append(factors_of(adapt(model, method)))
        assert torch.equal(state, torch.get_rng_state())
    for name, factors in found[0].items():
        assert all(equal_bits(t, found[1][name][role]) for role, t in factors.items())


DRAWN = {
    "adalora",
    "flora",
    "adamss",
    "frod",
    "kasa",
    "lora",
    "lora-xs",
    "randlora",
    "tinylora",
    "vera",
}  # start from random numbers


def draws(method: Any) -> bool:
    """Whether the start of a method is drawn from its seed, or a part of it."""
    inner = getattr(method, "inner", method)
    if inner == METHODS["flora"](rank=1) or getattr(inner, "std", None) == 0:  # all ones, all zeros
        return False
    return not DRAWN.isdisjoint({method.name, inner.name}) or "random" in str(method) or "reference" in str(method)


@every_factored
def test_factors_do_not_depend_on_the_order_of_modules(method: Method):
    def build(order: list[str], extra: bool) -> nn.ModuleDict:
        layers = {}
        for i, name in enumerate(("a", "b")):
            torch.manual_seed(i)
            layers[name] = nn.Linear(6, 9, dtype=torch.float64)
        model = nn.ModuleDict({name: layers[name] for name in order})
        if extra:
            model["c"] = nn.Linear(4, 7, dtype=torch.float64)
        return model

    alone = type(method).resolve is PerSite.resolve  # a method that shares ranks out looks at all sites
    options: dict[str, Any] = {"targets": "all-linear", "clip_rank": True}
    one = factors_of(adapt(build(["a", "b"], False), method, seed=3, **options))
    two = factors_of(adapt(build(["b", "a"], alone), method, seed=3, **options))
    for name in one:
        assert all(equal_bits(t, two[name][role]) for role, t in one[name].items())
    other = factors_of(adapt(build(["a", "b"], False), method, seed=4, **options))
    random = any(not equal_bits(t, other[n][role]) for n in one for role, t in one[n].items())
    assert random == draws(method)


def test_sites_of_one_shape_get_different_random_factors():
    model = nn.ModuleDict({name: nn.Linear(5, 4) for name in "ab"})
    found = factors_of(attach(model, LoRA(rank=2)))
    assert not torch.equal(found["a"]["A"], found["b"]["A"])


@every_factored
def test_thread_count_changes_factors_by_rounding_only(method: Method):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = nn.ModuleDict({"layer": nn.Linear(70, 90, dtype=torch.float64)})
        found.append(factors_of(adapt(model, method))["layer"])
    for role, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][role], rtol=1e-9, atol=1e-9)


# -- 10 folding ----------------------------------------------------------------------------------------------


@every_kind
@every_factored
def test_folded_agrees_in_outputs_and_gradients(method: Method, kind: tuple[str, int]):
    model, x = host(kind)
    adapter = adapt(model, method)
    base = {name: w.clone() for name, w in weights_of(model, adapter).items()}
    perturb(adapter)
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    inputs += adapter.parameters()
    out = model.layer(x)
    weights = torch.randn_like(out)
    expected = torch.autograd.grad((out * weights).sum(), inputs)
    adapter.fold()
    folded = model.layer(x)
    close(folded, out)
    for found, wanted in zip(torch.autograd.grad((folded * weights).sum(), inputs), expected, strict=True):
        close(found, wanted)
    written = {name: w.clone() for name, w in base.items()}
    for site in adapter.sites.values():
        start = site.method.anchor(site.factors)
        if start is not None and not site.skips:
            written[weight_of(model, site)] -= site.kind.from_matrix(site.places[0].module, start.dense().detach())
    for name, w in weights_of(model, adapter).items():
        close(w.detach(), written[name])
    perturb(adapter, seed=11)  # training goes on while it is folded
    later = model.layer(x)
    adapter.unfold()
    assert all(equal_bits(w, base[name]) for name, w in weights_of(model, adapter).items())
    close(model.layer(x), later)
    adapter.fold()
    adapter.merge()
    close(model.layer(x), later)
    adapter.unmerge()
    assert all(equal_bits(w, base[name]) for name, w in weights_of(model, adapter).items())


@every_called
@every_factored
def test_folded_full_rank_never_reads_the_weight(method: Method, kind: tuple[str, int]):
    model, x = host(kind)
    adapter = adapt(model, method)
    site = adapter.sites["layer"]
    perturb(adapter)
    expected = model.layer(x)
    adapter.fold()
    assert site.skips == (site.method.replaces_weight(*site.shape[1:]) and site.kind.multiplies)
    if not site.skips:
        return
    weight = stored(model.layer, "weight").clone()
    with torch.no_grad():
        stored(model.layer, "weight").fill_(float("nan"))
        close(model.layer(x), expected)
        stored(model.layer, "weight").copy_(weight)
    adapter.unfold()
    assert "forward" not in vars(model.layer)
    close(model.layer(x), expected)


# -- drawn layers --------------------------------------------------------------------------------------------

METHOD = st.sampled_from(methods(factored=True))
SEED = st.integers(0, 2**16)


@st.composite
def linears(draw: Any) -> tuple[str, nn.Module, Tensor]:
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    torch.manual_seed(draw(SEED))
    layer = nn.Linear(n, m, bias=draw(st.booleans()), dtype=torch.float64)
    lead = draw(st.lists(st.integers(0, 4), max_size=3))
    x = torch.randn(*lead, n, dtype=torch.float64)
    if len(lead) > 1 and draw(st.booleans()):
        x = x.transpose(0, 1)  # not contiguous
    return "linear", layer, x


@st.composite
def convolutions(draw: Any) -> tuple[str, nn.Module, Tensor]:
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = tuple(draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims)))
    dilation = tuple(draw(st.lists(st.integers(1, 2), min_size=dims, max_size=dims)))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    stride: Any = draw(st.integers(1, 2))
    padding: Any = draw(st.integers(0, 2))
    if draw(st.booleans()):
        padding, stride = "same", 1
        kernel = tuple(k | 1 for k in kernel)  # torch warns of even ones
    torch.manual_seed(draw(SEED))
    layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 4)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
        dtype=torch.float64,
    )
    batch = [draw(st.integers(1, 2))] if draw(st.booleans()) or dims == 1 else []  # an image without a batch
    space = [5 + draw(st.integers(0, 3)) for _ in range(dims)]
    return "conv", layer, torch.randn(*batch, layer.in_channels, *space, dtype=torch.float64)


def turns(method: Any, case: tuple[str, nn.Module, Tensor]) -> bool:
    """Whether a method that rotates the inputs has at least two of them."""
    name, layer, _ = case
    return method.name not in ("oft", "boft") or KINDS[name]().to_matrix(layer, layer.weight).shape[-1] > 1


@settings(max_examples=120)
@given(case=st.one_of(linears(), convolutions()), method=METHOD, seed=SEED)
def test_drawn_layers(case: tuple[str, nn.Module, Tensor], method: Factored, seed: int):
    """One walk through every state on a drawn layer in float64."""
    assume(turns(method, case))
    name, layer, x = case
    note(f"{layer} on {tuple(x.shape)} with {method}")
    kind = KINDS[name]()
    model = nn.ModuleDict({"layer": layer}).eval()
    before = snapshot(model)
    layer.requires_grad_(False)  # torch picks a linear layer's kernel by this flag: the same, where bits are compared
    base = layer(x)
    layer.requires_grad_(True)
    adapter = adapt(model, method, seed=seed)
    site = adapter.sites["layer"]
    if site.method.exact_start:
        assert torch.equal(layer(x), base)
    perturb(adapter, seed=seed)
    delta = adapter.delta("layer")
    assert delta.shape == layer.weight.shape
    if (product := site.method.product(site.factors)) is not None:
        assert int(exact_rank(product).max()) <= site.method.export_rank(*site.shape[1:])
    expected = kind.add_bias(layer, kind.run(layer, x, stored(layer, "weight") + delta)).detach()
    for dense in paths(site):
        site.dense = dense
        close(layer(x).detach(), expected)
    adapter.merge()
    close(layer(x).detach(), expected)
    adapter.unmerge()
    adapter.fold()
    close(layer(x).detach(), expected)
    with adapter.disabled():
        assert torch.equal(layer(x), base)
    assert site.count == site.method.count(*site.shape)
    adapter.detach()
    assert_same(before, snapshot(model))
    layer.requires_grad_(False)
    assert torch.equal(layer(x), base)


@settings(max_examples=60)
@given(case=st.one_of(linears(), convolutions()), method=METHOD, dtype=st.sampled_from(HALVES), seed=SEED)
def test_drawn_layers_in_low_precision(
    case: tuple[str, nn.Module, Tensor], method: Factored, dtype: torch.dtype, seed: int
):
    assume(turns(method, case))
    name, wide, x = case
    kind, x = KINDS[name](), x.to(dtype)
    layer = copy.deepcopy(wide).to(dtype).requires_grad_(False)  # see above
    wide.load_state_dict(layer.state_dict())
    model = nn.ModuleDict({"layer": layer}).eval()
    base, weight = layer(x), layer.weight.clone()
    adapter = adapt(model, method, seed=seed)
    site = adapter.sites["layer"]
    if site.method.exact_start:
        assert torch.equal(layer(x), base)
    perturb(adapter, seed=seed)
    exact = kind.add_bias(wide, kind.run(wide, x.double(), weight.double() + site.delta().double()))
    size = magnitude(kind, wide, x, weight, site)
    close_to_rounding(layer(x), exact, size, dtype)
    adapter.merge()
    close_to_rounding(layer(x), exact, size, dtype)
    adapter.unmerge()
    adapter.fold()
    close_to_rounding(layer(x), exact, size, dtype)
    adapter.unfold()
    assert equal_bits(stored(layer, "weight"), weight)


# -- living in a larger program ------------------------------------------------------------------------------


@every_kind
@every_factored
@pytest.mark.parametrize("folded", [False, True], ids=["attached", "folded"])
def test_deepcopy_is_independent(method: Method, kind: tuple[str, int], folded: bool):
    model, x = host(kind)
    types = [type(m) for m in model.modules()]
    before, expected = snapshot(model), frozen(model, x)
    adapter = adapt(model, method, train=("head",))
    perturb(adapter)
    if folded:
        adapter.fold()
    adapted = model(x)
    twin, twin_adapter = copy.deepcopy((model, adapter))
    assert torch.equal(twin(x), adapted)
    perturb(twin_adapter, seed=3)
    assert differs(twin(x), adapted)
    assert torch.equal(model(x), adapted)
    later = twin(x)
    twin_adapter.merge()
    close(twin(x), later)
    assert torch.equal(model(x), adapted)
    twin_adapter.detach()
    assert torch.equal(frozen(twin, x), expected)
    assert not any(len(m._forward_hooks) for m in twin.modules())
    assert [type(m) for m in twin.modules()] == types
    assert torch.equal(model(x), adapted)
    adapter.detach()
    assert_same(before, snapshot(model))


@every_factored
def test_second_adapter_on_a_deepcopy_shares_the_record_of_the_weight(method: Method):
    model, x = host(LINEAR)
    perturb(adapt(model, LoRA(rank=2)))
    twin = copy.deepcopy(model)
    weight = stored(twin.layer, "weight").clone()
    one = twin._svdpeft.adapters["default"]
    two = adapt(twin, method, name="two")
    perturb(two)
    expected = twin(x)
    one.merge()
    two.merge()
    one.unmerge()
    close(twin(x), expected)
    two.unmerge()
    assert equal_bits(stored(twin.layer, "weight"), weight)


@every_factored
@pytest.mark.parametrize("kind", [LINEAR, READ], ids=label)
@pytest.mark.parametrize("state", ["attached", "merge", "fold"])
def test_pickle_and_torch_save(method: Method, state: str, kind: tuple[str, int]):
    model, x = host(kind)
    expected = frozen(model, x)
    adapter = adapt(model, method, train=("head",))
    perturb(adapter)
    if state != "attached":
        getattr(adapter, state)()
    adapted = model(x)
    buffer = io.BytesIO()
    torch.save((model, adapter), buffer)
    buffer.seek(0)
    for twin, twin_adapter in (pickle.loads(pickle.dumps((model, adapter))), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), adapted)
        perturb(twin_adapter, seed=5)
        if state == "attached":
            assert differs(twin(x), adapted)
        twin_adapter.detach()
        assert torch.equal(frozen(twin, x), expected)
    assert torch.equal(model(x), adapted)


@every_factored
@pytest.mark.parametrize("kind", [LINEAR, ("conv", 0), READ, ("attention", 0)], ids=label)
@pytest.mark.parametrize("folded", [False, True], ids=["attached", "folded"])
def test_compiled_equals_eager(method: Method, kind: tuple[str, int], folded: bool):
    torch.compiler.reset()
    model, x = host(kind)
    adapter = adapt(model, method)
    perturb(adapter)
    if folded:
        adapter.fold()
    expected = model.layer(x)
    block = nn.Sequential(model.layer, nn.Tanh())
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    close(compiled(x), torch.tanh(expected))
    with adapter.disabled():
        close(compiled(x), block(x))
    close(compiled(x), torch.tanh(expected))


# Compiling takes seconds: one of each method, and the sparse core.
COMPILED = [*{m.name: m for m in reversed(methods(True))}.values(), SVFT(pattern="banded")]


@pytest.mark.parametrize("method", COMPILED, ids=label)
@pytest.mark.parametrize("kind", [LINEAR, READ], ids=label)
def test_compiled_gradients_equal_eager(method: Method, kind: tuple[str, int]):
    torch.compiler.reset()
    model, x = host(kind)
    adapter = adapt(model, method)
    perturb(adapter)
    parameters = list(adapter.parameters())
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(torch.autograd.grad(compiled(x).square().sum(), parameters), expected, strict=True):
        close(found, wanted)


@every_called
@every_factored
@pytest.mark.parametrize("folded", [False, True], ids=["attached", "folded"])
def test_autocast_keeps_the_dtype_and_the_value(method: Method, kind: tuple[str, int], folded: bool):
    model, x = host(kind, dtype=torch.float32)
    found, layer = KINDS[kind[0]](), model.layer
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base = layer(x)
    adapter = adapt(model, method)
    site = adapter.sites["layer"]
    if site.method.exact_start:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x), base)
    perturb(adapter)
    wide, _ = host(kind)
    exact = found.add_bias(
        wide.layer, found.run(wide.layer, widened(x), (stored(layer, "weight") + site.delta()).double())
    )
    size = magnitude(found, wide.layer, x, stored(layer, "weight"), site)
    if folded:
        adapter.fold()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == base.dtype
    close_to_rounding(out, exact, size, torch.bfloat16)
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


@every_factored
@pytest.mark.parametrize("kind", [LINEAR, READ], ids=label)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("folded", [False, True], ids=["attached", "folded"])
def test_gradient_checkpointing(method: Method, use_reentrant: bool, folded: bool, kind: tuple[str, int]):
    model, x = host(kind)
    adapter = adapt(model, method)
    perturb(adapter)
    if folded:
        adapter.fold()
    x.requires_grad_()
    inputs = list(adapter.parameters())
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in inputs]
    for p in inputs:
        p.grad = None
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    for p, wanted in zip(inputs, expected, strict=True):
        close(p.grad, wanted)


@every_kind
@every_factored
@pytest.mark.parametrize("folded", [False, True], ids=["attached", "folded"])
def test_keyword_input(method: Method, kind: tuple[str, int], folded: bool):
    model, x = host(kind)
    adapter = adapt(model, method)
    perturb(adapter)
    expected = model.layer(x)
    if folded:
        adapter.fold()
    word = type(model.layer).forward.__code__.co_varnames[1]
    close(model.layer(**{word: x}), expected)


@every_factored
def test_summary_and_repr(method: Method):
    model, _ = host(LINEAR)
    adapter = adapt(model, method, train=("head.bias",))
    text = adapter.summary()
    site = adapter.sites["layer"]
    assert str(site.method) in text
    assert "5x7" in text
    assert "linear" in text
    assert f"{adapter.trainable_count:,}" in text
    assert "head.bias" in text
    assert "head: not in targets" in text
    base = sum(v.numel() for k, v in host(LINEAR)[0].named_parameters())
    assert f"{adapter.trainable_count / base:.3%} of {base:,}" in text
    adapter.fold()
    assert ("from factors alone" in adapter.summary()) == site.skips
    assert "folded" in repr(adapter)


def test_summary_of_a_second_adapter_does_not_name_the_first_ones_factors():
    model, _ = host(LINEAR)
    first = adapt(model, LoRA(rank=2))
    second = adapt(model, LoRA(rank=2), name="two")
    assert dict(second.skipped) == dict(first.skipped) == {"head": "not in targets"}
    assert "svdpeft" not in second.summary()


def test_summary_joins_repeated_blocks():
    model = nn.ModuleDict(
        {"blocks": nn.Sequential(*(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6)) for _ in range(3)))}
    )
    text = attach(model, LoRA(rank=2)).summary()
    assert "×3" in text
    assert text.count("6x4") == 1


@every_factored
def test_methods_survive_json(method: Method):
    fields = json.loads(json.dumps(method.to_json()))
    again = METHODS[fields.pop("name")](**fields)
    assert again == method


def test_head_of_a_host_is_untouched_by_a_site_beside_it():
    model, _x = host(LINEAR)
    adapter = adapt(model, SVFT())
    perturb(adapter)
    assert isinstance(model, Host)
    assert list(adapter.sites) == ["layer"]
    assert not model.head.weight.requires_grad
    adapter.detach()
    assert model.head.weight.requires_grad


def test_load_gives_the_methods_of_attach(tmp_path: Path):
    model, x = host(LINEAR)
    adapter = adapt(model, METHODS["sorsa"](rank={"layer": 2, ".*": 1}))
    perturb(adapter)
    expected = model(x)
    adapter.save(tmp_path / "a")
    adapter.detach()
    again = load(model, tmp_path / "a", name="again")
    assert again.name == "again"
    assert torch.equal(model(x), expected)
    assert again.methods == adapter.methods
