"""Rows of one batch with adapters of their own: equal to one row after the other, or refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from helpers import (
    Both,
    adapt,
    assert_same,
    below,
    close,
    differs,
    equal_bits,
    example,
    near_by_change,
    perturb,
    refused,
    snapshot,
)
from rows import EVERYTHING, asked, called, rows
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from svdpeft import SORSA, SVFT, LoRA, PiSSA, attach
from svdpeft.adapter import blocks
from svdpeft.adapter.adapter import Adapter
from svdpeft.methods.base import Method
from svdpeft.sites.scope import scope


def alone(model: nn.Module, adapters: list[Adapter], row: Tensor, name: str | None) -> Tensor:
    """What the model gives for one row with one adapter, the others switched off."""
    if not adapters:
        return model(row)
    if adapters[0].name == name:
        return alone(model, adapters[1:], row, name)
    with adapters[0].disabled():
        return alone(model, adapters[1:], row, name)


def one_by_one(model: nn.Module, adapters: list[Adapter], x: Tensor, names: list[str | None]) -> Tensor:
    return torch.cat([alone(model, adapters, x[i : i + 1], name) for i, name in enumerate(names)])


class Only(nn.Module):
    """A layer under test that is called alone."""

    def __init__(self, layer: nn.Module, targets: tuple[str, ...] = ("layer",)) -> None:
        super().__init__()
        self.layer, self.targets = layer, targets

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def five(x: Tensor) -> Tensor:
    """Five rows that differ."""
    if not x.is_floating_point():
        return x[torch.arange(5) % len(x)].roll(1, 1)
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, *x.shape[1:], generator=generator, dtype=x.dtype)


NAMES = ["a", None, "b", "c", "a"]


# The example of a mixture routes by the positions of its rows: real ones are below.
TURN = [(m, k) for m, k in asked("a batch with an adapter per row") if m.factored and k[0] != "experts"]


@rows("method, kind", TURN)
def test_rows_are_as_if_each_were_alone(method: Method, kind: tuple[str, int]):
    _, layer, x = example(kind)
    x, model = five(x), Only(layer, below(kind)).eval()
    adapters = [
        adapt(model, method, name="a"),
        adapt(model, LoRA(rank=1), name="b", seed=6),
        adapt(model, SVFT(), name="c", seed=7),
    ]
    for seed, adapter in enumerate(adapters):
        perturb(adapter, seed=seed)
    expected = one_by_one(model, adapters, x, NAMES)
    everything = model(x)
    before = snapshot(model)
    with adapters[1].per_example(NAMES):
        found = model(x)
    assert_same(before, snapshot(model))
    close(found, expected)
    assert torch.equal(model(x), everything)
    with adapters[0].disabled(), adapters[1].disabled(), adapters[2].disabled():
        close(found[1], model(x)[1])
        # Where the call is split the row was in a batch of one, which may take another kernel.
        assert equal_bits(found[1], model(x)[1]) or not called(kind)
    weights = torch.linspace(1, 2, expected.numel()).view_as(expected).double()
    trained = [list(adapter.parameters()) for adapter in adapters]
    flat = [p for parameters in trained for p in parameters]
    for got, wanted in zip(
        torch.autograd.grad((found * weights).sum(), flat, allow_unused=True),
        torch.autograd.grad((expected * weights).sum(), flat, allow_unused=True),
        strict=True,
    ):
        assert (got is None) == (wanted is None)
        if wanted is not None:
            close(got, wanted)


def stack() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    return model, torch.randn(4, 3, 6, dtype=torch.float64)


def two(model: nn.Module, **options: Any) -> list[Adapter]:
    adapters = [
        attach(model, PiSSA(rank=2), name="a", **options),
        attach(model, SORSA(rank=3), name="b", **options),
    ]
    for seed, adapter in enumerate(adapters):
        perturb(adapter, seed=seed)
    return adapters


def test_adapters_on_other_layers_add_nothing_to_a_row():
    model, x = stack()
    adapters = [
        attach(model, PiSSA(rank=2), targets=["0"], name="a"),
        attach(model, LoRA(rank=2), targets=["2"], name="b"),
        attach(model, LoRA(rank=1), name="not named"),
    ]
    for adapter in adapters:
        perturb(adapter)
    names = ["b", "a", "base", "b"]
    expected = one_by_one(model, adapters, x, [None if n == "base" else n for n in names])
    with adapters[0].per_example(names):
        found = model(x)
        assert differs(found[3], x.new_zeros(1))
    close(found, expected)
    found.sum().backward()
    assert all(p.grad is None for p in adapters[2].parameters())
    with adapters[0].per_example([None, "base", None, "base"]):
        base = model(x)
    with adapters[0].disabled(), adapters[1].disabled(), adapters[2].disabled():
        assert torch.equal(base, model(x))


def test_a_batch_of_one_adapter_is_that_adapter():
    model, x = stack()
    a, b = two(model)
    with b.disabled():
        expected = model(x)
    with a.per_example(["a"] * 4):
        assert torch.equal(model(x), expected)


def test_a_row_gets_no_gradient_from_another():
    model, x = stack()
    a, b = two(model)
    x.requires_grad_()
    with a.per_example(["a", "b", "a", None]):
        out = model(x)
    out[[0, 2, 3]].sum().backward()
    assert all(not p.grad.any() for p in b.parameters() if p.grad is not None)
    assert all(p.grad is not None and p.grad.any() for p in a.parameters())
    assert x.grad is not None
    assert not x.grad[1].any()
    assert x.grad[3].any()


def test_dropout_falls_on_the_rows_that_have_it():
    model, x = stack()
    a = attach(model, LoRA(rank=2, dropout=0.5), name="a")
    b = attach(model, LoRA(rank=2), name="b")
    perturb(a)
    perturb(b)
    model.train()
    with a.per_example(["a", "b", "a", None]):
        one, other = model(x), model(x)
    assert torch.equal(one[[1, 3]], other[[1, 3]])
    assert differs(one[[0, 2]], other[[0, 2]])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_with_backward_in_the_block(reentrant: bool):
    model, x = stack()
    a, b = two(model)
    x.requires_grad_()
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        with a.per_example(["a", "b", None, "b"]):
            out = run(x)
            assert isinstance(out, Tensor)
            grads.append(
                torch.autograd.grad(out.pow(2).sum(), [*a.parameters(), *b.parameters()], allow_unused=True)
                if run is model
                else _backward(out, [*a.parameters(), *b.parameters()])
            )
    for plain, again in zip(*grads, strict=True):
        close(again, plain)


def _backward(out: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    out.pow(2).sum().backward()
    return [p.grad for p in parameters]


def test_autocast_and_low_precision():
    model, x = stack()
    model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    a, b = two(model)
    with a.per_example(["a", "b", None, "b"]):
        found = model(x)
    assert found.dtype == torch.bfloat16
    expected = one_by_one(model, [a, b], x, ["a", "b", None, "b"])
    with a.disabled(), b.disabled():
        near_by_change(found, expected, model(x), share=0.03)
    model, x = stack()
    model, x = model.float(), x.float()
    a, b = two(model)
    with a.per_example(["a", "b", None, "b"]), torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert found.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        expected = one_by_one(model, [a, b], x, ["a", "b", None, "b"])
    with a.disabled(), b.disabled():
        near_by_change(found, expected, model(x), share=0.03)


@pytest.mark.parametrize("backend", ["eager", *(["aot_eager"] if EVERYTHING else [])])
def test_compiled(backend: str):
    torch.compiler.reset()
    model, x = stack()
    adapters = two(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    mixed: list[list[str | None]] = [["a", "b", None, "b"], ["b", "a", "a", "a"], ["a", "a", "a", "a"], [None] * 4]
    for names in mixed:
        with adapters[0].per_example(names):
            found = compiled(x)
        close(found, one_by_one(model, adapters, x, names))
    close(compiled(x), model(x))
    torch.compiler.reset()


def test_the_forward_waits_for_nothing():
    """No value is read back from the device, whatever the rows."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    model, x = Windows().double(), torch.randn(4, 6, 4, dtype=torch.float64)
    a, _ = two(model)
    with a.per_example(["b", None, "a", "b"], flattened=True), Watch():
        model(x).sum().backward()


# -- layers that see more rows than the batch has ----------------------------------------------------------------------


class Windows(nn.Module):
    """Every example is cut into pieces, batch first, as Swin's windows are; then a layer on the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.outer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, n = x.shape
        y = self.inner(x.reshape(b * 3, t // 3, n)).reshape(b, t, -1)
        return self.outer(y)


def test_windows_are_refused_and_taken_when_the_user_says_so():
    torch.manual_seed(0)
    model, x = Windows().double(), torch.randn(4, 6, 4, dtype=torch.float64)
    a, b = two(model)
    names = ["b", None, "a", "b"]
    expected = one_by_one(model, [a, b], x, names)
    with refused(model, "inner", "12 rows", "4 names", "flattened=True"), a.per_example(names):
        model(x)
    with a.per_example(names, flattened=True):
        close(model(x), expected)
    with b.disabled():
        alone = model(x)
    with a.per_example(["a"] * 4, flattened=True):
        assert torch.equal(model(x), alone)


@pytest.mark.parametrize("flattened", [False, True])
def test_a_batch_of_another_size_is_refused(flattened: bool):
    model, x = stack()
    a, _ = two(model)
    with refused(model, "0 sees 4 rows", "3 names"), a.per_example(["a", "b", "b"], flattened=flattened):
        model(x)
    with refused(model, "0 sees 4 rows", "8 names"), a.per_example(["a", "b"] * 4, flattened=flattened):
        model(x)
    with a.per_example(["a", None]), pytest.raises(ValueError, match=r"sees 1 rows, .* no axis for the batch"):
        model(x[0, :1])
    with a.per_example(["a", None]), pytest.raises(ValueError, match="sees 3 rows"):
        model(x[0])


def test_swin_windows():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(1, 1), num_heads=(2, 2)
    )
    model = model.double().eval()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    a, b = two(model, targets=["qkv", "proj", "fc1"])
    names = ["a", "b", None]
    with refused(model, "layers.0.blocks.0.attn.qkv", "12 rows", "flattened=True"), a.per_example(names):
        model(x)
    with a.per_example(names, flattened=True):
        found = model(x)
    close(found, one_by_one(model, [a, b], x, names))


def test_a_language_model():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=2, vocab_size=20, n_positions=8)).double().eval()
    ids = torch.randint(20, (3, 5))
    a, b = two(model, targets=["c_attn[q,v]", "c_proj", "c_fc"])
    with a.per_example(["b", None, "a"]):
        found = model(ids).logits
    close(found, torch.cat([alone_logits(model, [a, b], ids[i : i + 1], n) for i, n in enumerate(["b", None, "a"])]))


def alone_logits(model: nn.Module, adapters: list[Adapter], ids: Tensor, name: str | None) -> Tensor:
    off = [adapter for adapter in adapters if adapter.name != name]
    for adapter in off:
        blocks.activate(adapter, False)
    try:
        return model(ids).logits
    finally:
        for adapter in off:
            blocks.activate(adapter, True)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_beams_and_several_sequences_for_each_prompt(options: dict[str, int]):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=2, vocab_size=20, n_positions=16)).double().eval()
    adapters = two(model, targets=["c_attn", "c_proj", "c_fc"])
    ids, names = torch.randint(1, 20, (3, 4)), ["b", None, "a"]
    same = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(3, 4), **options}
    with adapters[0].per_example(names, flattened=True):
        found = model.generate(ids, **same)
    alone = {**same, "attention_mask": torch.ones(1, 4)}
    rows = [
        alone_logits(lambda x: SimpleNamespace(logits=model.generate(x, **alone)), adapters, ids[i : i + 1], name)
        for i, name in enumerate(names)
    ]
    assert torch.equal(found, torch.cat(rows))
    assert len({tuple(row.tolist()) for row in found}) > 1
    with (
        adapters[0].per_example(names),
        pytest.raises(ValueError, match=r"beams or sequences of generate\(\)\), say flattened=True"),
    ):
        model.generate(ids, **same)


# -- what is refused -----------------------------------------------------------------------------------------------


def test_names_that_are_wrong():
    model, _ = stack()
    a, _ = two(model)
    attach(model, LoRA(rank=1), name="german")
    for names, words in (
        (["a", "germna"], ["row 1", "'germna'", "did you mean 'german'"]),
        ("a", ["'a'", "a sequence"]),
        ([], ["a sequence"]),
        ([3], ["row 0", "3"]),
    ):
        with refused(model, *words), a.per_example(names):  # type: ignore[arg-type]
            raise AssertionError
    attach(model, LoRA(rank=1), name="base")
    with refused(model, "'base'", "None"), a.per_example(["base"]):
        raise AssertionError


@pytest.mark.parametrize("state", ["merge", "fold"])
@pytest.mark.parametrize("named", [True, False])
def test_adapters_that_are_written_into_the_weights(state: str, named: bool):
    model, _ = stack()
    a, b = two(model)
    getattr(a, state)()
    names = ["a", "b"] if named else ["b", None]
    with refused(model, "'a'", state, "attached", error=RuntimeError), b.per_example(names):
        raise AssertionError
    a.detach()
    with pytest.raises(RuntimeError, match="detached"), a.per_example(["b"]):
        raise AssertionError


def test_disabled_adapters_may_stay_away_and_not_be_named():
    model, x = stack()
    a, b = two(model)
    names = [None, "b", "b", None]
    expected = one_by_one(model, [a, b], x, names)
    with a.disabled():
        with b.per_example(names):
            close(model(x), expected)
        with pytest.raises(RuntimeError, match="'a' is disabled"), b.per_example(["a"]):
            raise AssertionError


def test_a_merged_adapter_of_a_larger_model():
    whole = nn.ModuleDict({"part": stack()[0]})
    x = stack()[1]
    outside = attach(whole, LoRA(rank=1), name="outside")
    perturb(outside)
    a = attach(whole["part"], LoRA(rank=1), name="a")
    perturb(a)
    with outside.disabled():
        expected = whole["part"](x)
    with a.per_example(["a"] * 4):
        assert torch.equal(whole["part"](x), expected)
    outside.merge()
    with pytest.raises(RuntimeError, match=r"merged or folded at part\.0"), a.per_example(["a"]):
        raise AssertionError


@pytest.mark.parametrize("inside", ["per_example", "merge", "fold", "disabled", "detach", "attach", "unwritten"])
def test_what_cannot_be_done_within_the_block(inside: str):
    model, x = stack()
    a, b = two(model)
    before = snapshot(model)
    things: dict[str, Any] = {
        "attach": lambda: attach(model, LoRA(rank=1), name="new"),
        "per_example": lambda: b.per_example(["a"]).__enter__(),
        "disabled": lambda: b.disabled().__enter__(),
        "unwritten": lambda: b.unwritten().__enter__(),
    }
    with a.per_example(["a", "b", None, "b"]), pytest.raises(RuntimeError, match="per_example block"):
        things.get(inside, getattr(b, inside, None))()
    assert_same(before, snapshot(model))
    assert a.state == b.state == "attached"
    with a.per_example(["a", "b", None, "b"]):
        model(x)


def test_the_block_ends_when_something_raises():
    model, x = stack()
    a, b = two(model)
    expected = model(x)
    with pytest.raises(KeyError), a.per_example(["a"] * 4):
        raise KeyError
    assert torch.equal(model(x), expected)
    assert a.state == b.state == "attached"
    assert all(site.acts for adapter in (a, b) for site in adapter.sites.values())
    assert scope() is None


class Decoder(nn.Module):
    """Reads a raw parameter in its own call, and calls a layer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 6).double())
        self.fc = nn.Linear(6, 6).double()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.fc(torch.tanh(x @ self.w.T @ self.w) * scale)


class Encoder(nn.Module):
    """torch's own attention, with a mask for the batch and one for each example, and a head on its first token."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True).double()
        self.head = nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -1] = x[:, -1, 0] > 0
        out, weights = self.attention(x, x, x, key_padding_mask=padding, attn_mask=causal)
        assert weights.shape == (len(x), 4, 4)
        return self.head(out[:, 1])


def mixture() -> nn.Module:
    """A mixture of experts of transformers, whose tokens are flattened."""
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="transformers has no Mixtral")
    from transformers import MixtralConfig

    sizes = {"hidden_size": 6, "intermediate_size": 5, "num_local_experts": 3, "num_experts_per_tok": 2}
    block = modeling.MixtralSparseMoeBlock(MixtralConfig(**sizes))
    for p in block.parameters():
        nn.init.normal_(p)
    return block.double().eval()


READ = {
    "raw parameter": (lambda: Decoder(), ["w", "fc"], (4, 6), False),
    "attention": (lambda: Encoder(), "all", (4, 4, 6), False),
    "output projection": (lambda: Encoder(), ["out_proj"], (4, 4, 6), False),
    "experts": (mixture, ["gate_up_proj", "down_proj"], (4, 3, 6), True),
    "called and read": (lambda: Both().double(), "all", (4, 6), False),
}


@pytest.mark.parametrize("names", [["a", "b", None, "b"], ["b", "b", "b", "b"], ["a", "a", "b", "b"]], ids=str)
@pytest.mark.parametrize("what", READ)
def test_a_weight_that_is_read(what: str, names: list[str | None]):
    """Rows and gradients are those of one example after the other; afterwards the model is what it was."""
    make, targets, shape, flattened = READ[what]
    torch.manual_seed(0)
    model = make()
    model.eval()
    x = torch.randn(shape, dtype=torch.float64)
    a, b = attach(model, PiSSA(rank=2), targets, name="a"), attach(model, LoRA(rank=1), targets, name="b")
    for adapter in (a, b):
        perturb(adapter)
    model(x)
    before = snapshot(model)
    expected = one_by_one(model, [a, b], x, names)
    parameters = [*a.parameters(), *b.parameters()]
    wanted = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True)
    with a.per_example(names, flattened=flattened):
        got = model(x)
    close(got, expected)
    for mine, its in zip(torch.autograd.grad(got.square().sum(), parameters, allow_unused=True), wanted, strict=True):
        zero = torch.zeros((), dtype=torch.float64)  # nobody named it
        close(zero if mine is None else mine, zero if its is None else its)
    assert "forward" not in {name for module in model.modules() for name in vars(module)}
    assert_same(before, snapshot(model))


def test_a_layer_that_reads_its_weight_is_called_once_per_adapter_and_forms_it_once(monkeypatch: pytest.MonkeyPatch):
    model, x, calls, formed = Decoder(), torch.randn(6, 6).double(), [], []
    adapters = [attach(model, LoRA(rank=1), ["w"], name=name) for name in "abc"]
    monkeypatch.setattr(Decoder, "forward", lambda self, x, run=Decoder.forward: calls.append(len(x)) or run(self, x))
    for adapter in adapters:
        site = adapter.sites["w"]
        monkeypatch.setattr(site, "matrix", lambda *a, m=site.matrix, n=adapter.name: formed.append(n) or m(*a))
    with adapters[0].per_example(["a", "b", "a", None, "b", "a"]):
        model(x)
    assert calls == [3, 2, 1]
    assert formed == ["a", "b"]


def test_looking_at_weights_changes_nothing():
    """Whoever reads a weight outside of a forward computes nothing with it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **sizes)).double().eval()
    adapters = [attach(model, LoRA(rank=2), ["q_proj"], name=name) for name in "ab"]
    for seed, adapter in enumerate(adapters):
        perturb(adapter, seed=seed)
    x = torch.tensor([[3, 5, 7], [3, 5, 7]])
    with adapters[0].per_example(["a", "b"]):
        expected = model(x).logits
    assert all(hasattr(layer, "weight") for layer in model.modules() if isinstance(layer, nn.Linear))
    with adapters[0].per_example(["a", "b"]):
        close(model(x).logits, expected)


class Two(NamedTuple):
    """A layer's outputs."""

    y: Tensor
    x: Tensor


def test_named_tuples_and_the_number_of_rows():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 6).double())

        def forward(self, x: Tensor) -> Two:
            return Two(x @ self.w.T, x)

    model, x = Reads(), torch.randn(4, 6).double()
    a = attach(model, LoRA(rank=1), ["w"], name="a")
    perturb(a)
    with a.per_example(["a", None, "a", "a"]):
        found = model(x)
    close(found.x, x)
    close(found.y[0], model(x).y[0])
    with a.per_example(["a", "a"]), pytest.raises(ValueError, match="sees 4 rows"):
        model(x)


def test_what_cannot_be_split_is_refused():
    """Where it is not known which input has a row for each example, nothing is computed."""
    model, x = Both().double(), torch.randn(2, 6, dtype=torch.float64)
    a = attach(model, LoRA(rank=1), name="a")
    with refused(model, "reads the weight of layer", "once before", error=RuntimeError), a.per_example(["a", None]):
        model(x)
    with a.per_example([None, None]):  # not named: W0 for everybody
        model(x)
    time_first = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2)})
    a = attach(time_first, LoRA(rank=1), name="a")
    x = torch.randn(2, 2, 6)
    with refused(time_first, "in_proj_weight", "not known", error=RuntimeError), a.per_example(["a", None]):
        time_first["attention"](x, x, x)
    per_head = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2, batch_first=True)})
    a = attach(per_head, LoRA(rank=1), name="a")
    with refused(per_head, "attn_mask", error=RuntimeError), a.per_example(["a", None]):
        per_head["attention"](x, x, x, attn_mask=torch.zeros(4, 2, 2))

    class Cached(Decoder):
        def forward(self, x: Tensor, cache: Any = None, other: Any = None) -> Any:
            return super().forward(x), cache, x.sum() if other else None

    model = Cached()
    x = torch.randn(2, 6).double()
    a = attach(model, LoRA(rank=1), ["w"], name="a")
    with a.per_example(["a", None]):
        assert model(x)[1:] == (None, None)
        for bad, words in (({"cache": []}, "cache is a list"), ({"other": True}, "does not have a row for each")):
            with refused(model, words, error=RuntimeError):
                model(x, **bad)
        with refused(model, "sees 3 rows"):
            model(torch.randn(3, 6).double())


def test_what_is_one_for_the_whole_batch():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    a = attach(model, LoRA(rank=1), targets=["0"], train=["2"], name="a")
    b = attach(model, LoRA(rank=1), targets=["0"], name="b", batch_norm="frozen")
    with refused(model, "'a'", "2.weight", "train="), b.per_example(["b", None]):
        raise AssertionError
    with a.disabled(), b.per_example(["b", None, "b", None, "b"]):
        model(x)
    a.detach()
    c = attach(model, LoRA(rank=1), targets=["0"], name="c")
    with c.per_example(["b", None, "c", None, "b"]):
        model(x)
    b.detach()
    model.train()(x)
    with refused(model, "'c'", "running_mean", "batch_norm='frozen'"), c.per_example(["c", None]):
        raise AssertionError


def test_a_copy_of_the_model_is_in_no_block():
    model, x = stack()
    a, b = two(model)
    names: list[str | None] = ["a", "b", None, "b"]
    rows, expected = one_by_one(model, [a, b], x, names), model(x)
    assert differs(rows, expected)
    with a.per_example(names):
        other = copy.deepcopy(model)
        close(model(x), rows)
        assert torch.equal(other(x), expected)
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("names", [[None, None, None], ["base"] * 3])
@pytest.mark.parametrize("by_name", [False, True])
def test_rows_are_counted_where_no_adapter_acts_too(names, by_name):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x)

    model = Named()
    adapter = attach(model, LoRA(rank=1), ["fc"])
    hooks = len(model._forward_pre_hooks)
    with adapter.per_example(names):
        model(torch.zeros(3, 4))
        with pytest.raises(ValueError, match=r"the model is called with 4 rows, and per_example\(\) was given 3 names"):
            model(x=torch.zeros(4, 4)) if by_name else model(torch.zeros(4, 4))
    with adapter.per_example(names, flattened=True):
        model(torch.zeros(6, 4))
        with pytest.raises(ValueError, match="called with 4 rows"):
            model(torch.zeros(4, 4))
    assert len(model._forward_pre_hooks) == hooks
    model(torch.zeros(4, 4))


def test_a_block_that_is_refused_leaves_no_count_behind():
    model = nn.ModuleDict({"part": nn.Sequential(nn.Linear(4, 3)), "rest": nn.Linear(3, 2)})
    attach(model, LoRA(rank=1), ["part.0"], name="whole").merge()
    part = attach(model["part"], LoRA(rank=1), ["0"])
    with pytest.raises(RuntimeError, match="an adapter is merged or folded at"), part.per_example([None] * 3):
        pass
    model["part"](torch.zeros(5, 4))
