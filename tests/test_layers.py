"""Which layers a kind takes, and the ones that look alike but compute something else."""

from __future__ import annotations

import pytest
import torch
from helpers import adapt, close, host, perturb
from rows import QUANTISED, kinds, label
from torch import Tensor, nn
from torch.nn import functional as F

from svdpeft import SVFT, LoRA, PiSSA, attach
from svdpeft.layers.base import POSITIONS, SMALL
from svdpeft.layers.conv import Conv
from svdpeft.layers.linear import Linear
from svdpeft.methods.base import Method
from svdpeft.sites.weights import stored
from svdpeft.targets.inventory import kind_of


class Renamed(nn.Linear):
    """A subclass that keeps the forward: still a linear layer."""


class Standardised(nn.Conv2d):
    """A forward of its own (weight standardisation): the same update would merge wrongly."""

    def forward(self, input: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, w, self.bias)


@pytest.mark.parametrize("kind", [kind for kind in kinds() if kind not in QUANTISED], ids=label)
def test_examples_belong_to_their_own_kind(kind: tuple[str, int]):
    model, x = host(kind)
    adapter = adapt(model, LoRA(rank=1))
    assert kind[0] in {site.kind.name for site in adapter.sites.values()}
    assert x.dtype == torch.float64 or not x.is_floating_point()
    assert next(model.parameters()).dtype == torch.float64


class Wide(nn.Linear):
    """A forward of its own that is not linear in the weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, torch.tanh(self.weight), self.bias)


def test_subclasses():
    """One that keeps the forward is hooked; one with a forward of its own is adapted where that reads the weight."""
    assert isinstance(kind_of(Renamed(3, 4)), Linear)
    assert isinstance(kind_of(Standardised(3, 4, 2)), Conv)
    for other in (nn.LayerNorm((3, 2)), nn.Identity(), nn.Embedding(3, 4, max_norm=1.0), nn.LSTM(2, 3)):
        assert kind_of(other) is None
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": Renamed(3, 4), "b": Standardised(3, 4, 2), "c": Wide(3, 5)}).double()
    adapter = attach(model, LoRA(rank=1), targets="all")
    assert {name: site.path for name, site in adapter.sites.items()} == {
        "a": "factored",
        "b": "parametrised",
        "c": "parametrised",
    }
    perturb(adapter)
    x, image = torch.randn(2, 3).double(), torch.randn(2, 3, 4, 5).double()
    adapted = [model["a"](x), model["b"](image), model["c"](x)]
    adapter.merge()
    for found, expected in zip([model["a"](x), model["b"](image), model["c"](x)], adapted, strict=True):
        close(found, expected)


def test_the_class_of_a_read_layer_keeps_its_name_and_comes_back():
    model = nn.ModuleDict({"b": Standardised(3, 4, 2)})
    adapter = attach(model, LoRA(rank=1), targets="all")
    assert type(model["b"]) is not Standardised
    assert isinstance(model["b"], Standardised)
    assert type(model["b"]).__name__ == "Standardised"
    assert list(dict(model.named_parameters()))[:2] == ["b.weight", "b.bias"], "the base's names are as they were"
    adapter.detach()
    assert type(model["b"]) is Standardised


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.proj = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attention(x, x, x)[0])


def test_a_bilinear_layer_is_one_matrix_per_output():
    model = nn.ModuleDict({"score": nn.Bilinear(4, 3, 5).double()})
    site = attach(model, SVFT(), targets=["score"]).sites["score"]
    assert site.shape == (5, 4, 3)
    for w, sigma in zip(model["score"]._parameters["weight"].detach(), site.factors.sigma, strict=True):
        close(sigma.detach(), torch.linalg.svdvals(w))


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "fast path"])
def test_multihead_attention_is_three_matrices_and_an_output_merged_once(weights: bool):
    model = Block().double().eval()
    x = torch.randn(2, 4, 6).double()
    adapter = attach(model, PiSSA(rank=2))
    model(x)
    assert [f"{name}: {site.path}" for name, site in adapter.sites.items()] == [
        "attention.in_proj_weight[q]: parametrised",
        "attention.in_proj_weight[k]: parametrised",
        "attention.in_proj_weight[v]: parametrised",
        "attention.out_proj: parametrised",
        "proj: dense",
    ]
    perturb(adapter)
    with torch.set_grad_enabled(weights):  # without a gradient torch takes its fused kernel
        expected = model(x)
        base = model.attention.in_proj_weight.detach()
        adapter.merge()
        close(model(x), expected)
        assert torch.equal(model.attention._parameters["in_proj_weight"], model.attention.in_proj_weight)
        close(base, model.attention.in_proj_weight.detach())


def test_multihead_attention_against_three_own_matrices():
    """The parts q, k, v of in_proj_weight are what the attention itself uses as q, k and v."""
    attention = nn.MultiheadAttention(6, 2, batch_first=True, bias=False).double()
    model = nn.ModuleDict({"attention": attention})
    x = torch.randn(2, 4, 6).double()
    for part in "qkv":
        adapter = attach(model, LoRA(rank=2), targets=[f"in_proj_weight[{part}]"])
        assert list(adapter.sites) == [f"attention.in_proj_weight[{part}]"]
        perturb(adapter)
        q, k, v = (attention._parameters["in_proj_weight"].detach().chunk(3)["qkv".index(p)].clone() for p in "qkv")
        delta = adapter.delta(f"attention.in_proj_weight[{part}]").chunk(3)["qkv".index(part)]
        {"q": q, "k": k, "v": v}[part].add_(delta)
        heads = [(x @ w.T).unflatten(-1, (2, 3)).transpose(1, 2) for w in (q, k, v)]
        out = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2) @ attention.out_proj.weight.T
        close(attention(x, x, x)[0].detach(), out.detach())
        adapter.detach()


def test_transformer_encoder_layer_keeps_the_update_on_its_fast_path():
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).double().eval()
    x = torch.randn(2, 5, 8).double()
    with torch.no_grad():
        base = model(x)
        adapter = attach(model, PiSSA(rank=2))
        assert len(adapter.sites) == 6
        torch.testing.assert_close(model(x), base)
        perturb(adapter)
        adapted = model(x)
        adapter.merge()
        close(model(x), adapted)
    assert not torch.allclose(adapted, base)


def test_parametrised_weight_is_left_and_reported():
    model = nn.ModuleDict({"a": nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), "b": nn.Linear(5, 4)})
    adapter = attach(model, LoRA(rank=2))
    assert list(adapter.sites) == ["b"]
    assert "a" in adapter.skipped or any(name.startswith("a.") for name in adapter.skipped)
    with pytest.raises(ValueError, match="targets='a'"):
        attach(model, LoRA(rank=2), targets=["a"], name="two")


def test_the_cheaper_path_is_chosen_from_shapes():
    kind = Linear()
    assert not kind.prefers_dense((1, 768, 768), 8, mixes=False)
    assert not kind.prefers_dense((1, 4096, 4096), 4096, mixes=True), "never a large ΔW"
    assert kind.prefers_dense((96, 1, 9), 1, mixes=False), "a depthwise 3×3"
    assert kind.prefers_dense((1, 64, 64), 64, mixes=True)
    for batch, m, n, r in [(1, 512, 512, 300), (1, 10, 20, 1), (4, 8, 72, 4), (1, 512, 513, 512)]:
        thin, dense = POSITIONS * r * (m + n), POSITIONS * m * n + r * m * n
        assert kind.prefers_dense((batch, m, n), r, False) == (batch * m * n <= SMALL and dense < thin)
    # Frozen L and A have no gradient: through them two products each and not three, of a dense ΔW one less to make it.
    assert kind.prefers_dense((1, 192, 576), 192, False)
    assert not kind.prefers_dense((1, 192, 576), 192, False, frozen=True)
    assert kind.prefers_dense((1, 192, 192), 192, False, frozen=True)


@pytest.mark.parametrize(("method", "dense"), [(SVFT(), False), (SVFT(pattern="banded"), False), (LoRA(192), True)])
def test_a_site_knows_whether_its_bases_are_frozen(method: Method, dense: bool):
    assert attach(nn.Sequential(nn.Linear(576, 192)), method).sites["0"].dense == dense


def test_depthwise_is_dense_and_says_so():
    model = nn.ModuleDict({"layer": nn.Conv2d(16, 16, 3, groups=16)})
    adapter = adapt(model, LoRA(rank=1), targets=["layer"])
    assert adapter.sites["layer"].dense
    assert "dense" in adapter.summary()
    assert "16x(1x9)" in adapter.summary()


@pytest.mark.parametrize("shape", [(7,), (1, 7), (0, 7), (2, 0, 7), (2, 3, 1, 7)], ids=str)
def test_linear_takes_any_leading_shape(shape: tuple[int, ...]):
    model = nn.ModuleDict({"layer": nn.Linear(7, 5, dtype=torch.float64)})
    adapter = attach(model, PiSSA(rank=2))
    perturb(adapter)
    x = torch.randn(shape, dtype=torch.float64)
    layer = model["layer"]
    close(layer(x).detach(), F.linear(x, stored(layer, "weight") + adapter.delta("layer"), layer.bias).detach())


def test_output_that_a_later_layer_saved_is_still_right():
    """The update goes into the fresh output in place: autograd must never see a stale version."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 6), nn.ReLU(inplace=True)).double()
    perturb(attach(model, PiSSA(rank=2)))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, x)


def test_a_hook_of_the_user_sees_the_adapted_output_whichever_came_first():
    for first in (True, False):
        seen = []  # as it is then: the update is added in place
        model = nn.ModuleDict({"layer": nn.Linear(6, 5)})
        layer, x = model["layer"], torch.randn(2, 6)
        if first:
            layer.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out.clone()))
        adapter = attach(model, LoRA(rank=2))
        perturb(adapter)
        if not first:
            layer.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out.clone()))
        out = layer(x)
        assert torch.equal(seen[0], out)
        adapter.detach()
        assert len(layer._forward_hooks) == 1, "the user's hook stays"
