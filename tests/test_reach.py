"""Weights that a model reads instead of calling their layer, and weights that it never touches."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from helpers import Both, adapt, assert_same, close, differs, perturb, snapshot
from rows import every_factored
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import svdpeft.sites.reads
from svdpeft import SORSA, LoRA, PiSSA, attach, load
from svdpeft.methods.base import Method


class Attention(nn.Module):
    """As BEiT has it: the fused layer's weight is read, its own forward never runs."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width + 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.qkv.weight).chunk(3, -1)
        return self.proj(torch.softmax(q @ k.mT, -1) @ v)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.norm = nn.BatchNorm1d(5)
        self.unused = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.attention(x))


def build() -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    return Model().double(), torch.randn(4, 5, 6, dtype=torch.float64)


UNTOUCHED = pytest.mark.filterwarnings("ignore:1 adapted weights were not touched")


@every_factored
def test_the_first_batch_is_right_already(method: Method):
    """Output and gradients of the very first forward equal those of a model with dense weights W0 + ΔW."""
    model, x = build()
    adapter = adapt(model, method, targets="all-linear", exclude=["unused"])
    perturb(adapter)
    assert adapter.unreached == ["attention.qkv", "attention.proj"]
    first = model(x)
    assert adapter.unreached == []
    assert [s.path == "parametrised" for s in adapter.sites.values()] == [True, False]
    dense, _ = build()
    with torch.no_grad():
        dense.attention.qkv.weight += adapter.delta("attention.qkv")
        dense.attention.proj.weight += adapter.delta("attention.proj")
    close(first.detach(), dense(x).detach())
    parameters = list(adapter.parameters())
    gradients = torch.autograd.grad(first.square().sum(), parameters)
    second = model(x)
    close(second, first)
    for found, expected in zip(torch.autograd.grad(second.square().sum(), parameters), gradients, strict=True):
        close(found, expected)
    assert all(bool((g != 0).any()) for g in gradients)
    adapter.merge()
    close(model(x), first)


def test_nothing_but_the_reading_changes_in_the_first_batch():
    """The random state, running statistics and a failing forward; and the watch is gone afterwards."""
    model, x = build()
    before = snapshot(model)
    adapter = attach(model, PiSSA(rank=2), exclude=["unused"])
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, dtype=torch.float64))
    reference, _ = build()
    state = torch.get_rng_state()
    model(x)
    assert torch.equal(state, torch.get_rng_state())
    reference(x)
    assert torch.equal(model.norm.running_mean, reference.norm.running_mean)
    assert int(model.norm.num_batches_tracked) == 1
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not nn.modules.module._global_forward_hooks
    assert adapter.sites["attention.qkv"].path == "parametrised"
    adapter.detach()
    assert_same(before, snapshot(model))


def test_an_untouched_site_is_named():
    model, x = build()
    adapter = attach(model, LoRA(rank=2))
    with pytest.warns(UserWarning, match=r"1 adapted weights were not touched by the first batch .*: unused"):
        model(x)
    assert adapter.unreached == ["unused"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    perturb(adapter)
    layer, y = model.unused, torch.randn(2, 4, dtype=torch.float64)
    expected = F.linear(y, layer._parameters["weight"] + adapter.delta("unused"), layer.bias)
    close(layer(y).detach(), expected.detach())
    close(layer.weight.detach(), (layer._parameters["weight"] + adapter.delta("unused")).detach())
    assert adapter.unreached == []


class Asks(nn.Module):
    """Asking about a weight, as T5 does before it calls the layer, is not reading it."""

    def __init__(self) -> None:
        super().__init__()
        self.wo = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        # No assert around them: pytest rewrites it, and then the weight is read into a variable first.
        dtype, rows, count = self.wo.weight.dtype, self.wo.weight.size(0), len(self.wo.weight)
        if not isinstance(self.wo.weight, Tensor) or rows != count or dtype != x.dtype:
            raise AssertionError
        return self.wo(x.to(self.wo.weight.device))


class Sinusoidal(nn.Embedding):
    """As in Marian: looked up without a gradient."""

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


def test_a_layer_that_computes_under_no_grad_is_left_and_named():
    model = nn.ModuleDict({"positions": Sinusoidal(5, 4), "layer": nn.Linear(4, 3)})
    adapter = attach(model, LoRA(rank=2), targets="all")
    assert adapter.skipped == {"positions": "Sinusoidal computes under no_grad: nothing would train there"}
    with pytest.raises(ValueError, match="positions cannot be adapted: Sinusoidal computes under no_grad"):
        attach(model, LoRA(rank=2), targets=["positions"], name="two")


def test_asking_is_not_reading():
    model = Asks()
    adapter = attach(model, LoRA(rank=2))
    model(torch.randn(2, 6))
    assert adapter.sites["wo"].path == "factored"
    assert not adapter.sites["wo"].places[0].was_read


def test_t5_builds_no_weight(monkeypatch: pytest.MonkeyPatch):
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(T5Config(d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, vocab_size=20)).eval()
    attach(model, LoRA(rank=2))
    monkeypatch.setattr(svdpeft.sites.reads, "adapted", lambda *_: pytest.fail("a weight was built to be asked about"))
    model(torch.tensor([[1, 2, 3]]))


def test_machinery_means_the_parameter():
    model, x = build()
    adapter = attach(model, PiSSA(rank=2), exclude=["unused"])
    perturb(adapter)
    assert model.get_parameter("attention.qkv.weight") is model.attention.qkv._parameters["weight"]
    model(x)
    assert model.attention.proj.weight.requires_grad, "who reads it gets W0 + ΔW, with its gradient"


def test_factors_that_were_moved_away_are_missed():
    model, x = build()
    attach(model, PiSSA(rank=2), exclude=["unused"])
    for layer, name in ((model.attention.proj, "attention.proj"), (model.attention.qkv, "attention.qkv")):
        layer.svdpeft.to("meta")
        with pytest.raises(RuntimeError, match=f"the factors of {name} are on meta and the layer computes on cpu"):
            model(x)


def test_policy_and_reference_in_one_call():
    """The weight that is kept within a call is kept for the adapters that are on."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            policy = x @ self.w.mT
            with adapter.disabled():
                return policy, x @ self.w.mT

    model, x = Pair(), torch.randn(2, 3, dtype=torch.float64)
    fixed = attach(model, LoRA(rank=1), targets=["w"], name="fixed")
    adapter = attach(model, PiSSA(rank=2), targets=["w"])
    for each in (fixed, adapter):
        perturb(each)
    policy, reference = model(x)
    w = model._parameters["w"].detach() + fixed.delta("w")
    close(reference.detach(), x @ w.mT)
    close(policy.detach(), x @ (w + adapter.delta("w")).mT)


def test_on_demand():
    model, x = build()
    model.attention.eval()
    adapter = attach(model, SORSA(rank=2), targets=["qkv", "unused"])
    modes = [module.training for module in model.modules()]
    statistics = model.norm.running_mean.clone()
    assert adapter.check_reach(x) == ["unused"]
    assert adapter.sites["attention.qkv"].path == "parametrised"
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.norm.running_mean, statistics)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)


def test_a_weight_that_is_called_and_read():
    torch.manual_seed(0)
    model, x = Both().double(), torch.randn(3, 6, dtype=torch.float64)
    base = model(x)
    adapter = attach(model, PiSSA(rank=2))
    perturb(adapter)
    first, second = model(x), model(x)
    assert differs(first, base)
    close(second, first)
    adapter.merge()
    close(model(x), first)
    adapter.unmerge()
    adapter.fold()
    close(model(x), first)
    adapter.unfold()
    reference = copy.deepcopy(model)
    w = model.layer._parameters["weight"] + adapter.delta("layer")
    close(first.detach(), (torch.tanh(F.linear(x, w, model.layer.bias)) @ w).detach())
    with adapter.disabled():
        torch.testing.assert_close(model(x), base)
    close(reference(x), first)


def test_a_folded_full_rank_layer_that_turns_out_to_be_read():
    from svdpeft import SVFT

    torch.manual_seed(0)
    model, x = Both().double(), torch.randn(3, 6, dtype=torch.float64)
    adapter = attach(model, SVFT())
    perturb(adapter)
    w = model.layer._parameters["weight"] + adapter.delta("layer")
    expected = (torch.tanh(F.linear(x, w, model.layer.bias)) @ w).detach()
    adapter.fold()
    for _ in range(2):
        close(model(x).detach(), expected)
    adapter.unfold()
    close(model(x).detach(), expected)


def test_a_second_adapter_on_a_layer_that_is_read():
    model, x = build()
    one = attach(model, PiSSA(rank=2), targets=["qkv"])
    perturb(one)
    model(x)
    two = attach(model, LoRA(rank=2), targets=["qkv"], name="two")
    perturb(two)
    both = model(x)
    one.merge()
    two.merge()
    close(model(x), both)


@UNTOUCHED
def test_a_loaded_adapter_is_right_from_its_first_batch(tmp_path):
    model, x = build()
    adapter = attach(model, PiSSA(rank=2))
    perturb(adapter)
    expected = model.eval()(x)
    adapter.save(tmp_path / "a")
    again, _ = build()
    load(again, tmp_path / "a")
    assert torch.equal(again.eval()(x), expected)


@pytest.mark.parametrize("how", ["part", "forward", "compile", "functional", "export", "trace"])
def test_every_way_to_the_first_output_is_right(how: str):
    """A model need not be called as a whole, nor eagerly, for its reads to be answered."""
    torch.compiler.reset()
    model, x = build()
    model.eval()
    adapter = attach(model, PiSSA(rank=2), exclude=["unused"])
    perturb(adapter)
    dense, _ = build()
    with torch.no_grad():
        dense.attention.qkv.weight += adapter.delta("attention.qkv")
        dense.attention.proj.weight += adapter.delta("attention.proj")
    expected = dense.eval().attention(x) if how == "part" else dense.eval()(x)
    ways = {
        "part": lambda: model.attention(x),
        "forward": lambda: model.forward(x),
        "compile": lambda: torch.compile(model, fullgraph=True, backend="aot_eager")(x),
        "functional": lambda: torch.func.functional_call(model, dict(model.named_parameters()), (x,)),
        "export": lambda: torch.export.export(model, (x,)).module()(x),
        "trace": lambda: torch.jit.trace(model, (x,), check_trace=False)(x),
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.trace", FutureWarning)
        warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
        close(ways[how]().detach(), expected.detach())


@UNTOUCHED
def test_copied_and_pickled_before_the_first_batch():
    model, x = build()
    adapter = attach(model, PiSSA(rank=2))
    perturb(adapter)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        out = twin(x)
        assert twin._svdpeft.adapters["default"].sites["attention.qkv"].path == "parametrised"
        close(twin(x), out)
    assert adapter.sites["attention.qkv"].path == "factored"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_in_the_first_batch(use_reentrant: bool):
    class Checkpointed(Model):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.attention, x, use_reentrant=use_reentrant)

    gradients = []
    for cls in (Model, Checkpointed):
        torch.manual_seed(0)
        model = cls().double()
        model.norm = nn.Identity()
        x = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
        adapter = attach(model, PiSSA(rank=2), exclude=["unused"])
        perturb(adapter)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in adapter.parameters()])
    for found, expected in zip(*gradients, strict=True):
        close(found, expected)


def test_dropout_on_a_weight_that_is_read_is_refused():
    model, x = build()
    attach(model, LoRA(rank=2, dropout=0.5), targets=["qkv"])
    with pytest.raises(RuntimeError, match=r"dropout 0.5 at attention.qkv: the model reads the weight"):
        model(x)
    heads = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    with pytest.raises(ValueError, match=r"dropout 0.5 at attention.in_proj_weight\[q\]"):
        attach(heads, LoRA(rank=2, dropout=0.5))
    with pytest.raises(ValueError, match=r"dropout 0.5 at attention.out_proj"):
        attach(heads, LoRA(rank=2, dropout=0.5), targets=["out_proj"])


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_after_the_check(fullgraph: bool):
    torch.compiler.reset()
    model, x = build()
    model.norm = nn.Identity()
    adapter = attach(model, PiSSA(rank=2), exclude=["unused"])
    perturb(adapter)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    close(compiled(x), expected)


def test_a_compiled_part():
    torch.compiler.reset()
    model, x = build()
    adapter = attach(model, PiSSA(rank=2), exclude=["unused"])
    perturb(adapter)
    expected = model(x)
    model.attention.compile(fullgraph=True, backend="eager")
    close(model(x), expected)


def test_a_class_that_somebody_derives_from_ours_stays():
    """As FSDP does with the class of every module that it shards."""
    model, x = build()
    adapter = attach(model, PiSSA(rank=2), exclude=["unused"])
    perturb(adapter)
    expected = model(x)
    theirs = type("FSDPLinear", (type(model.attention.qkv),), {})
    model.attention.qkv.__class__ = theirs
    close(model(x), expected)
    adapter.merge()
    close(model(x), expected)
    adapter.detach()
    assert type(model.attention.qkv) is theirs
    torch.testing.assert_close(model(x), build()[0](x), rtol=1e-10, atol=1e-12)


def test_a_weight_read_without_gradients_first_has_them_afterwards():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.is_transposed = False
            self.down_proj = nn.Parameter(torch.randn(4, 5, 3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                size = self.down_proj.norm()
            return (x @ self.down_proj[0].mT / size).sum()

    model = nn.ModuleDict({"experts": Normed()})
    adapter = attach(model, LoRA(rank=1))
    perturb(adapter)
    model["experts"](torch.randn(2, 3)).backward()
    assert all(p.grad is not None and p.grad[0].any() for p in adapter.parameters())


def test_a_weight_read_many_times_in_one_call_is_computed_once(monkeypatch: pytest.MonkeyPatch):
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.is_transposed = False
            self.down_proj = nn.Parameter(torch.randn(4, 5, 3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return sum((x @ self.down_proj[i].mT for i in range(4)), torch.zeros(()))

    model = nn.ModuleDict({"experts": Experts()})
    adapter = attach(model, LoRA(rank=1))
    perturb(adapter)
    calls = []
    real = svdpeft.sites.reads.adapted
    monkeypatch.setattr(svdpeft.sites.reads, "adapted", lambda *a: calls.append(1) or real(*a))
    x = torch.randn(2, 3, dtype=torch.float64)
    out = model["experts"](x)
    assert len(calls) == 1
    out.sum().backward()
    model["experts"](x).sum().backward()  # the next call has a graph of its own
    assert len(calls) == 2
    assert not svdpeft.sites.reads._thread.calls
    assert not svdpeft.sites.reads._thread.forming


def test_threads_do_not_see_each_others_calls():
    """A weight that is called and read: whether its own forward runs is a question of the thread."""
    torch.manual_seed(0)
    model, x = Both().double(), torch.randn(3, 6, dtype=torch.float64)
    perturb(attach(model, PiSSA(rank=2)))
    expected = model(x)
    inside, go = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go.wait(10)

    model.layer.register_forward_pre_hook(wait)
    found: list[Tensor] = []
    other = threading.Thread(target=lambda: found.append(model(x)))
    other.start()
    assert inside.wait(10)
    read = model.layer.weight  # here nobody runs the layer
    go.set()
    other.join()
    w = model.layer._parameters["weight"] + model._svdpeft.adapters["default"].delta("layer")
    close(read.detach(), w)
    close(found[0], expected)


def test_an_interrupted_call_leaves_nothing_behind():
    model, x = Both().double(), torch.randn(3, 6, dtype=torch.float64)
    perturb(attach(model, PiSSA(rank=2)))
    expected = model(x)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    close(model(x), expected)
    assert not svdpeft.sites.reads._thread.calls
