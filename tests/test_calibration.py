"""The calibration pass: what it sums up, what it leaves alone, what it refuses; and its way into ``attach``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from einops import rearrange
from helpers import assert_same, close, host, perturb, refused, snapshot
from rows import EVERYTHING, called, every_trainable, kinds, label, layer_kind
from safetensors.torch import load_file, save_file
from test_real_models import real
from torch import Tensor, nn
from torch.nn import functional as F

import svdpeft
from svdpeft import EVA, Calibration, CorDA, LoRA, LoRAGA, LoRANull, attach, calibrate
from svdpeft.calibration.calibration import FORMAT
from svdpeft.layers.base import CalledKind
from svdpeft.layers.quantised import weight
from svdpeft.registry import KINDS

FROM_DATA = [CorDA(rank=2), CorDA(rank=2, mode="kpm"), LoRANull(rank=2), LoRANull(rank=2, version="v2"), EVA(rank=2)]
FROM_DATA.append(LoRAGA(rank=2))


def randn(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64)


def squares(output: Any, batch: Any) -> Tensor:
    return output.square().mean()


class Net(nn.Module):
    """Two layers, a norm with running statistics, dropout, and one layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(8, dtype=torch.float64)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(8, 5, dtype=torch.float64)
        self.idle = nn.Linear(3, 4, dtype=torch.float64)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.second(self.drop(torch.tanh(self.norm(self.first(x) * scale))))


LIVE = ["first", "second"]


# -- what it sums up -----------------------------------------------------------------------------------------


SEEING = [kind for kind in kinds() if called(kind) and layer_kind(kind).sees]


def every_seeing(test: Any) -> Any:
    return pytest.mark.parametrize("kind", SEEING, ids=label)(test)


@pytest.mark.parametrize("kind", [kind for kind in SEEING if kind[0] != "conv-transpose"], ids=label)
def test_the_matrices_times_the_inputs_are_what_the_layer_does(kind: tuple[str, int]):
    """W0 x for every x that is counted has the layer's outputs' moments: up to their order the same vectors."""
    model, x = host(kind)
    layer, found = model.layer, layer_kind(kind)
    assert isinstance(found, CalledKind)
    inputs = found.inputs(layer, x)
    stored = weight(layer, "weight").detach()
    w = found.to_matrix(layer, stored)  # (*b, m, n)
    assert inputs.shape[-1] == w.shape[-1]
    assert inputs.shape[: w.ndim - 2] == w.shape[:-2]
    flat = inputs.reshape(*w.shape[:-2], -1, w.shape[-1])
    out = flat @ w.mT  # (*b, positions, m)
    expected = found.run(layer, x, stored)
    if out.ndim == 2:
        close(out.reshape(expected.shape), expected)
        return
    batch, _, *space = expected.shape
    close(out.reshape(w.shape[0], batch, *space, -1).movedim(-1, 2).movedim(0, 1).reshape(expected.shape), expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_columns_of_a_transposed_convolution(groups: int):
    """Where the stride is the kernel, columns do not overlap: the output is W0 x, put in order."""
    layer = nn.ConvTranspose2d(4, 6, (3, 2), stride=(3, 2), groups=groups, bias=False, dtype=torch.float64)
    kind = KINDS["conv-transpose"]()
    assert isinstance(kind, CalledKind)
    x = randn(2, 4, 5, 3)
    for given in (x, x[0]):
        columns = kind.inputs(layer, given) @ kind.to_matrix(layer, layer.weight.detach()).mT.unsqueeze(1).unsqueeze(1)
        out = rearrange(columns, "g n h w (o i j) -> n (g o) (h i) (w j)", i=3, j=2)
        close(out if given.ndim == 4 else out[0], layer(given).detach())


@every_seeing
def test_streamed_is_all_at_once_and_order_does_not_matter(kind: tuple[str, int]):
    model, x = host(kind)
    batches = [x, x.flip(-1) * 0.5, x[:1] + 1]
    found = layer_kind(kind)
    assert isinstance(found, CalledKind)
    w = found.to_matrix(model.layer, weight(model.layer, "weight").detach())
    rows = torch.cat([found.inputs(model.layer, b).reshape(*w.shape[:-2], -1, w.shape[-1]) for b in batches], -2)
    for order in (batches, batches[::-1]):
        seen = calibrate(model, iter(order), ["layer"])["layer"]
        assert seen.second is not None
        assert seen.total is not None
        assert seen.gradient is None
        assert seen.count == rows.shape[-2]
        close(seen.second, rows.mT @ rows)
        close(seen.total, rows.sum(-2))


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": (2, 1), "groups": 3}])
def test_patches_of_a_convolution_are_those_of_unfold(options: dict[str, Any]):
    layer, x = nn.Conv2d(6, 9, (3, 2), dtype=torch.float64, **options), randn(2, 6, 9, 8)
    groups = layer.groups
    places = {k: v for k, v in options.items() if k != "groups"}
    patches = F.unfold(x, (3, 2), **places)  # (N, 6·3·2, L), channels first
    rows = patches.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)  # (g, N·L, n)
    model = nn.ModuleDict({"layer": layer})
    seen = calibrate(model, [x], ["layer"], call=lambda model, x: model["layer"](x))["layer"]
    assert seen.second is not None
    close(seen.second, rows.mT @ rows)
    one = calibrate(model, [x[0]], ["layer"], call=lambda model, x: model["layer"](x))["layer"]  # without a batch axis
    assert one.count == seen.count // 2


@every_trainable
def test_gradients_are_the_mean_over_batches_for_every_kind(kind: tuple[str, int]):
    """Through autograd on the parameter: embeddings, raw parameters, experts, attention and parts included."""
    model, x = host(kind)
    # The last axis alone: a token id must stay a token id.
    batches = [x, x.flip(-1), x.roll(1, -1)]
    seen = calibrate(model, batches, list(model.targets), inputs=False, gradients=True, loss=squares)
    adapter = attach(model, LoRA(rank=1), list(model.targets))
    sites = adapter.sites
    adapter.detach()
    assert list(seen) == list(sites)
    for name, site in sites.items():
        module, parameter = site.places[0].module, site.places[0].parameter
        w = module._parameters[parameter]
        total = sum(torch.autograd.grad(squares(model(b), b), w)[0] for b in batches)
        close(seen[name].gradient, site.kind.to_matrix(module, total / 3))
        assert seen[name].second is None


def test_parts_of_a_fused_weight_share_inputs_and_take_their_rows_of_the_gradient():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.qkv(x).square().sum()

    model, x = Block(), randn(7, 4)
    seen = calibrate(model, [x], ["qkv[q,v]"], gradients=True, loss=lambda out, batch: out)
    assert list(seen) == ["qkv[q]", "qkv[v]"]
    assert seen["qkv[q]"].second is seen["qkv[v]"].second
    whole = calibrate(model, [x], ["qkv"], gradients=True, loss=lambda out, batch: out)["qkv"]
    close(seen["qkv[q]"].second, whole.second)
    close(seen["qkv[q]"].gradient, whole.gradient[:4])
    close(seen["qkv[v]"].gradient, whole.gradient[8:])
    for method in FROM_DATA:
        attach(model, method, ["qkv[q,v]"], calibration=seen).detach()


def test_a_tied_weight_sees_all_its_inputs_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    model, x = Tied(), randn(5, 4)
    middle = torch.tanh(model.a(x)).detach()
    seen = calibrate(model, [x], gradients=True, loss=squares)
    assert list(seen) == ["a"]
    assert seen["a"].count == 10
    close(seen["a"].second, x.T @ x + middle.T @ middle)
    close(seen["a"].gradient, torch.autograd.grad(squares(model(x), x), model.a.weight)[0])


class Tokens(nn.Module):
    """Layers of tokens, of flattened tokens, and of one pooled vector."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4, dtype=torch.float64)
        self.each, self.flat, self.pooled = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        x = self.each(self.embed(input_ids))
        x = self.flat(x.flatten(0, 1)).view(x.shape)
        weight = attention_mask.unsqueeze(-1).to(x)
        return SimpleNamespace(loss=self.pooled((x * weight).sum(1) / weight.sum(1)).square().mean())


def test_padding_does_not_count():
    model, ids = Tokens(), torch.randint(1, 9, (3, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    seen = calibrate(model, [batch], ["each", "flat", "pooled"])
    x = model.embed(ids)[mask.bool()].detach()
    assert seen["each"].count == seen["flat"].count == len(x) == 10
    assert seen["pooled"].count == 3
    close(seen["each"].second, x.T @ x)
    other = ids.masked_fill(mask == 0, 3)  # what stands there does not matter
    again = calibrate(model, [batch | {"input_ids": other}], ["each", "flat", "pooled"])
    for name in seen:
        assert torch.equal(seen[name].second, again[name].second)
    labelled = calibrate(model, [batch], ["each"], mask=lambda batch: batch["attention_mask"] * (ids > 4))["each"]
    assert labelled.count == int((mask.bool() & (ids > 4)).sum())
    everything = calibrate(model, [batch], ["each"], mask=lambda batch: None)["each"]
    assert everything.count == 15


def test_low_precision_is_summed_in_float32():
    model = nn.Sequential(nn.Linear(6, 4)).to(torch.bfloat16)
    batches = [torch.randn(50, 6, dtype=torch.bfloat16) for _ in range(4)]
    seen = calibrate(model, batches, gradients=True, loss=squares)["0"]
    x = torch.cat(batches).double()
    assert seen.second is not None
    assert seen.gradient is not None
    assert {seen.second.dtype, seen.total.dtype, seen.gradient.dtype} == {torch.float32}  # type: ignore[union-attr]
    torch.testing.assert_close(seen.second.double(), x.T @ x, rtol=1e-5, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = calibrate(model.float(), [b.float() for b in batches])["0"]
    torch.testing.assert_close(wide.second, seen.second, rtol=1e-5, atol=1e-4)


def test_batches_are_called_as_what_they_are():
    model, x = Net().eval(), randn(4, 6)
    expected = calibrate(model, [x], LIVE)
    for batch in ((x, 1.0), [x], {"x": x}, {"x": x, "scale": 1.0}):
        assert torch.equal(calibrate(model, [batch], LIVE)["second"].second, expected["second"].second)
    pair = calibrate(model, [(x, "label")], LIVE, call=lambda model, batch: model(batch[0]))
    assert torch.equal(pair["second"].second, expected["second"].second)
    model.first.register_forward_pre_hook(lambda module, args, kwargs: ((), {"input": args[0]}), with_kwargs=True)
    assert torch.equal(calibrate(model, [x], LIVE)["first"].second, expected["first"].second)


# -- what it leaves alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_what_it_was(gradients: bool, fails: bool):
    model = Net().train()
    model.norm.eval()
    model.first.weight.requires_grad_(False)
    model.second.register_buffer("seen", torch.zeros(2))

    def counts(module: Any, *rest: Any) -> None:  # state that a model keeps, whatever its mode
        module.seen += 1
        module.register_buffer("late", torch.ones(1))

    model.second.register_forward_hook(counts)
    model(randn(4, 6)).sum().backward()
    del model.second._buffers["late"]
    model.second.seen.zero_()
    before, grads = snapshot(model), {n: p.grad for n, p in model.named_parameters()}
    values = {n: None if g is None else g.clone() for n, g in grads.items()}

    def batches() -> Iterator[Tensor]:
        yield randn(4, 6)
        if fails:
            raise KeyError("data")
        yield randn(3, 6)

    def run() -> Calibration:
        return calibrate(model, batches(), LIVE, gradients=gradients, loss=squares)

    if fails:
        with pytest.raises(KeyError, match="data"):
            run()
    else:
        run()
    assert_same(before, snapshot(model))
    for name, p in model.named_parameters():
        assert p.grad is grads[name]
        assert p.grad is None or torch.equal(p.grad, values[name])


def test_it_runs_in_evaluation_mode_without_a_graph():
    model, x = Net().train(), randn(4, 6)
    seen = []
    model.second.register_forward_hook(lambda m, args, out: seen.append((model.training, out.requires_grad)))
    calibrate(model, [x], LIVE)
    calibrate(model, [x], LIVE, gradients=True, loss=squares)
    assert seen == [(False, False), (False, True)]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    calibrate(model, [x], LIVE)
    assert torch.equal(state, torch.get_rng_state())


def test_attached_adapters_are_not_seen():
    model, x = Net().eval(), randn(9, 6)
    expected = calibrate(model, [x], LIVE, gradients=True, loss=squares)
    one = attach(model, svdpeft.PiSSA(rank=2), LIVE, train=("idle",))
    perturb(one)
    model.train()(x)  # its running statistics are the adapter's, too
    two = attach(model, LoRA(rank=1), LIVE, name="two")
    perturb(two)
    model.eval()
    for state in ("attached", "merge", "fold"):
        if state != "attached":
            getattr(one, state)()
        out = model(x)
        before = snapshot(model)
        seen = calibrate(model, [x], LIVE, gradients=True, loss=squares)
        for name, statistics in expected.items():
            close(seen[name].second, statistics.second)
            close(seen[name].gradient, statistics.gradient)
        assert torch.equal(model(x), out)
        assert_same(before, snapshot(model))
        if state != "attached":
            getattr(one, f"un{state}")()
    adapter = attach(model, CorDA(rank=2), LIVE, name="three", calibration=expected)
    assert torch.equal(model(x), out) or (model(x) - out).abs().max() < 1e-12
    adapter.detach()


def test_the_first_batch_of_the_training_is_still_awaited():
    model, x = Net().eval(), randn(9, 6)
    adapter = attach(model, LoRA(rank=1))
    calibrate(model, [x], LIVE)
    with pytest.warns(UserWarning, match="not touched by the first batch .*: idle"):
        model(x)
    adapter.detach()
    assert not model._forward_hooks


def test_a_part_of_an_adapted_model_is_refused():
    model = Net().eval()
    adapter = attach(model, LoRA(rank=2), LIVE)
    with pytest.raises(ValueError, match="has an adapter of a larger model"):
        calibrate(model.first, [randn(4, 6)], [""], call=lambda layer, x: layer(x))
    adapter.merge()
    with pytest.raises(ValueError, match="has an adapter of a larger model"):
        calibrate(model.first, [randn(4, 6)])


# -- what it refuses -----------------------------------------------------------------------------------------


def test_what_is_not_seen_is_named():
    model, x = Net(), randn(4, 6)
    with pytest.warns(UserWarning, match=r"1 sites were not seen.*: idle"):
        seen = calibrate(model, [x])
    assert list(seen) == LIVE
    with pytest.warns(UserWarning, match="idle"):
        assert list(calibrate(model, [x], inputs=False, gradients=True, loss=squares)) == LIVE
    with refused(model, "nothing was seen of idle"):
        calibrate(model, [x], ["idle"])

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.a(x), self.b.weight)

    with pytest.warns(UserWarning, match="read and never called.*: b"):
        seen = calibrate(Reads(), [torch.randn(3, 4)], gradients=True, loss=squares)
    assert seen["b"].second is None
    assert seen["b"].gradient is not None
    with pytest.raises(ValueError, match="CorDA starts from the inputs of b"):
        attach(Reads(), CorDA(rank=2), calibration=seen)
    attach(Reads(), LoRAGA(rank=2), calibration=seen)
    attach(Reads(), CorDA(rank=2), exclude=("b",), calibration=seen)


def test_batches_that_cannot_be():
    model, x = Net(), randn(4, 6)
    used = iter([x])
    list(used)
    for batches in ([], used):
        with refused(model, "there is no batch"):
            calibrate(model, batches, LIVE)
    with refused(model, "nothing to look at"):
        calibrate(model, [x], LIVE, inputs=False)
    with refused(model, "the inputs of first hold NaN"):
        calibrate(model, [x, x * torch.tensor(float("inf"))], LIVE)
    with torch.no_grad():
        model.first.bias[0] = float("nan")
    with refused(model, "the inputs of second hold NaN"):
        calibrate(model, [x], LIVE)
    with torch.no_grad():
        model.first.bias[0] = 0
    with refused(model, "the gradients of first hold NaN"):
        calibrate(model, [x], LIVE, inputs=False, gradients=True, loss=lambda out, batch: out.sum() * float("inf"))
    with refused(model, "'frist'", "first"):
        calibrate(model, [x], ["frist"])


def test_losses_that_cannot_be():
    model, x = Net(), randn(4, 6)
    with refused(model, "the model's output has no loss", "loss=lambda output, batch"):
        calibrate(model, [x], LIVE, gradients=True)
    for loss, what in (
        (lambda out, batch: out, r"shape \[4, 5\]"),
        (lambda out, batch: out.sum().item(), "float"),
        (lambda out, batch: out.sum().detach(), "depends on the weights"),
    ):
        with pytest.raises(ValueError, match=what):
            calibrate(model, [x], LIVE, gradients=True, loss=loss)
    tokens, ids = Tokens(), torch.randint(1, 9, (3, 5))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seen = calibrate(tokens, [batch], ["each"], gradients=True)  # the output's own
    close(seen["each"].gradient, torch.autograd.grad(tokens(**batch).loss, tokens.each.weight)[0])


# -- its way into attach -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FROM_DATA, ids=str)
def test_attach_wants_a_calibration_of_this_model(method: Any):
    model, x = Net().eval(), randn(20, 6)
    seen = calibrate(model, [x], LIVE, gradients=True, loss=squares)
    for calibration in (None, {}):
        with refused(
            model, type(method).__name__, "of first", f"svdpeft.calibrate(model, batches, {method.needs}=True)"
        ):
            attach(model, method, LIVE, calibration=calibration)
    with refused(model, "the calibration saw nothing of second", "Known: first"):
        attach(model, method, LIVE, calibration=Calibration({"first": seen["first"]}))
    other = nn.ModuleDict({"first": nn.Linear(6, 8), "second": nn.Linear(7, 6)})
    with refused(other, "of another model", "second", "6x7"):
        attach(other, method, LIVE, calibration=seen)
    lacking = {"gradients": {"gradient": None}, "inputs": {"second": None}}[method.needs]
    with refused(model, "starts from the", "of second"):
        attach(model, method, LIVE, calibration={**seen, "second": seen["second"]._replace(**lacking)})
    expected = model(x)
    attach(model, method, LIVE, calibration=seen)
    assert torch.equal(model(x), expected)


def test_nothing_is_decomposed_before_all_sites_are_checked(monkeypatch: pytest.MonkeyPatch):
    model = Net()
    seen = calibrate(model, [randn(20, 6)], LIVE)
    for name in ("svd", "eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, lambda *args, **kwargs: pytest.fail("decomposed"))
    for method in (CorDA(rank=2), LoRANull(rank=2), EVA(rank=2)):
        with pytest.raises(ValueError, match="nothing of second"):
            attach(model, method, LIVE, calibration={"first": seen["first"]})


def test_methods_say_which_kinds_have_no_inputs():
    for method in FROM_DATA:
        for name in KINDS:
            reason = method.why_not(KINDS[name]())
            sees = KINDS[name].sees
            assert (reason is None) == (sees or method.needs == "gradients"), name
            assert reason is None or f"kind {name!r} see none" in reason
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="EVA starts from the inputs of a layer, and weights of kind 'embedding'"):
        attach(model, EVA(rank=2), ["0"])
    seen = calibrate(model, [torch.arange(9)])
    assert "kind 'embedding' see none" in attach(model, EVA(rank=2), "all", calibration=seen).skipped["0"]


@pytest.mark.parametrize("method", FROM_DATA, ids=str)
def test_an_adapter_from_data_is_saved_and_loaded_without_the_data(method: Any, tmp_path: Any):
    model, x = Net().eval(), randn(20, 6)
    adapter = attach(model, method, LIVE, calibration=calibrate(model, [x], LIVE, gradients=True, loss=squares))
    perturb(adapter)
    expected = model(x)
    adapter.save(tmp_path / "a")
    adapter.detach()
    svdpeft.load(model, tmp_path / "a")
    assert torch.equal(model(x), expected)


# -- files ---------------------------------------------------------------------------------------------------


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.conv = nn.Linear(4, 12), nn.Conv1d(4, 6, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.qkv(x)[..., :4].mT)


def fused() -> tuple[nn.Module, Calibration]:
    model = Fused()
    batches = [torch.randn(2, 5, 4) for _ in range(3)]
    return model, calibrate(model, batches, ["qkv[q,k,v]", "conv"], gradients=True, loss=squares)


def test_a_file_gives_back_every_bit(tmp_path: Any):
    model, seen = fused()
    seen.save(tmp_path / "deep" / "seen.safetensors")
    again = Calibration.load(tmp_path / "deep" / "seen.safetensors")
    assert list(again) == list(seen)
    assert repr(again) == repr(seen) == "Calibration(inputs of 4 sites, gradients of 4 sites)"
    for name, statistics in seen.items():
        assert again[name].count == statistics.count
        for field in ("second", "total", "gradient"):
            assert torch.equal(getattr(again[name], field), getattr(statistics, field))
    keys = load_file(tmp_path / "deep" / "seen.safetensors")
    assert sum(key.endswith("/second") for key in keys) == 2, "the parts' inputs are written once"
    seen.save(tmp_path / "deep" / "seen.safetensors")  # over itself
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["seen.safetensors"]
    x = torch.randn(2, 5, 4)
    expected = model(x)
    attach(model, CorDA(rank=2), ["qkv[q,k,v]", "conv"], calibration=again)
    assert torch.equal(model(x), expected)


def test_a_crash_leaves_the_old_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    _, seen = fused()
    path = tmp_path / "seen.safetensors"
    seen.save(path)
    before = path.read_bytes()

    def crash(tensors: Any, file: Any, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("svdpeft.calibration.calibration.save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        Calibration({}).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_other_files_are_refused_by_name(tmp_path: Any):
    _, seen = fused()
    path = tmp_path / "seen.safetensors"
    seen.save(path)
    whole, tensors = path.read_bytes(), load_file(path)
    sites = {name: {"count": 3, "second": f"{name}/second", "total": f"{name}/total"} for name in ("conv",)}
    good = {"format": FORMAT, "sites": json.dumps(sites)}
    wrong = tensors | {"conv/second": tensors["conv/second"][:, :2].contiguous()}
    lacking = {k: v for k, v in tensors.items() if k != "conv/second"}
    for content, words in (
        (whole[: len(whole) // 2], "damaged"),
        (b"words", "damaged"),
        ((tensors, {"format": "svdpeft calibration 9", "sites": "{}"}), "'svdpeft calibration 9'"),
        ((tensors, None), "has format None"),
        ((wrong, good), r"at conv .* shape \[2, 2, 6\]"),
        ((lacking, good), "conv lacks 'conv/second'"),
    ):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file(content[0], path, metadata=content[1])
        with pytest.raises(ValueError, match=words) as caught:
            Calibration.load(path)
        assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match="No such file"):
        Calibration.load(tmp_path / "none")
    path.write_bytes(b"words")
    with pytest.raises(FileExistsError, match="not overwritten"):
        seen.save(path)
    assert path.read_bytes() == b"words"


# -- real models ---------------------------------------------------------------------------------------------


VISION = [CorDA(rank=4), LoRAGA(rank=4), *([LoRANull(rank=4), EVA(rank=4)] if EVERYTHING else [])]


@pytest.mark.apart
@pytest.mark.parametrize("method", VISION, ids=str)
def test_a_vision_model_starts_at_its_base(method: Any):
    model = real("dinov2-vits14", image_size=56).model
    batches = [torch.randn(4, 3, 56, 56) for _ in range(3)]
    targets = [r"blocks\.[0-2]\..*", "patch_embed.proj"]
    before = snapshot(model)
    wanted = {"inputs": method.needs == "inputs", "gradients": method.needs == "gradients"}
    seen = calibrate(model, batches, targets, loss=squares, **wanted)
    assert_same(before, snapshot(model))
    with torch.no_grad():
        expected = model(batches[0])
        adapter = attach(model, method, targets, calibration=seen)
        assert torch.equal(model(batches[0]), expected)
        assert len(adapter.sites) == 13
        ranks = [site.method.rank for site in adapter.sites.values()]
        assert sum(ranks) == 13 * 4
        assert (len(set(ranks)) > 1) == (method.name == "eva")
        perturb(adapter, size=0.01)
        assert not torch.equal(model(batches[0]), expected)


@pytest.mark.apart
@pytest.mark.parametrize("method", [CorDA(rank=4), LoRAGA(rank=4)], ids=str)
def test_a_language_model_starts_at_its_base(method: Any):
    model = real("smollm2-135m", dtype=torch.bfloat16).model
    ids = torch.randint(20, 2000, (2, 24))
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    targets = [r".*layers\.(0|29)\.self_attn\..*_proj"]
    wanted = {"inputs": method.needs == "inputs", "gradients": method.needs == "gradients"}
    seen = calibrate(model, [batch], targets, **wanted)
    if method.needs == "inputs":
        assert {s.count for s in seen.values()} == {34}
    with torch.no_grad():
        expected = model(**batch).logits
        attach(model, method, targets, calibration=seen)
        assert torch.equal(model(**batch).logits, expected)
