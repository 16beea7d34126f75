"""Which layers a kind takes, and the ones that look alike but compute something else."""

from __future__ import annotations

import pytest
import torch
from helpers import adapt, close, kinds, label, perturb
from torch import Tensor, nn
from torch.nn import functional as F

from svdpeft import LoRA, PiSSA, attach
from svdpeft.layers.base import POSITIONS, SMALL
from svdpeft.layers.linear import Linear
from svdpeft.registry import KINDS
from svdpeft.targets import kind_of


class Renamed(nn.Linear):
    """A subclass that keeps the forward: still a linear layer."""


class Standardised(nn.Conv2d):
    """A forward of its own (weight standardisation): the same update would merge wrongly."""

    def forward(self, input: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, w, self.bias)


@pytest.mark.parametrize("kind", kinds(), ids=label)
def test_examples_belong_to_their_own_kind_only(kind: tuple[str, int]):
    layer, x = KINDS[kind[0]]().examples()[kind[1]]
    assert [name for name in KINDS if KINDS[name].handles(layer)] == [kind[0]]
    assert x.dtype == torch.float64
    assert next(layer.parameters()).dtype == torch.float64


def test_subclasses():
    assert isinstance(kind_of(Renamed(3, 4)), Linear)
    assert kind_of(Standardised(3, 4, 2)) is None
    for other in (
        nn.ConvTranspose2d(3, 4, 2),
        nn.Bilinear(2, 3, 4),
        nn.LayerNorm(3),
        nn.Embedding(3, 4),
        nn.Identity(),
    ):
        assert kind_of(other) is None
    model = nn.ModuleDict({"a": Renamed(3, 4), "b": Standardised(3, 4, 2)})
    adapter = attach(model, LoRA(rank=1), targets="all")
    assert list(adapter.sites) == ["a"]
    assert adapter.skipped == {"b": "no layer kind adapts a Standardised"}


def test_attention_projection_that_is_read_and_not_called():
    """MultiheadAttention reads out_proj.weight: a hook there would never run, and merging would change the output."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = nn.ModuleDict({"attention": attention, "proj": nn.Linear(8, 5)})
    adapter = attach(model, LoRA(rank=2), targets="all")
    assert list(adapter.sites) == ["proj"]
    assert adapter.skipped["attention"] == "no layer kind adapts a MultiheadAttention"
    assert adapter.skipped["attention.out_proj"].startswith("its weight is read by nn.MultiheadAttention")
    assert "attention.out_proj" in adapter.summary()
    with pytest.raises(ValueError, match=r"attention.out_proj: its weight is read by nn.MultiheadAttention"):
        attach(model, LoRA(rank=2), targets=["out_proj"], name="two")


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
    close(layer(x).detach(), F.linear(x, layer.weight + adapter.delta("layer"), layer.bias).detach())


def test_output_that_a_later_layer_saved_is_still_right():
    """The update goes into the fresh output in place: autograd must never see a stale version."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 6), nn.ReLU(inplace=True)).double()
    perturb(attach(model, PiSSA(rank=2)))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, x)


def test_a_hook_of_the_user_sees_the_adapted_output_whichever_came_first():
    for first in (True, False):
        seen = []
        model = nn.ModuleDict({"layer": nn.Linear(6, 5)})
        layer, x = model["layer"], torch.randn(2, 6)
        if first:
            layer.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out))
        adapter = attach(model, LoRA(rank=2))
        perturb(adapter)
        if not first:
            layer.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out))
        out = layer(x)
        assert torch.equal(seen[0], out)
        adapter.detach()
        assert len(layer._forward_hooks) == 1, "the user's hook stays"
