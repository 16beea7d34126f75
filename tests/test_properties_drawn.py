"""Layers and inputs that hypothesis draws, each through every state of an adapter."""

from __future__ import annotations

import copy
from typing import Any

import torch
from helpers import (
    adapt,
    assert_same,
    close,
    close_to_rounding,
    equal_bits,
    magnitude,
    paths,
    perturb,
    seeded,
    snapshot,
)
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st
from rows import methods
from torch import Tensor, nn

from svdpeft.decomposition import exact_rank
from svdpeft.layers.base import LayerKind
from svdpeft.methods.base import Factored
from svdpeft.registry import KINDS
from svdpeft.sites.weights import stored

HALVES = (torch.float32, torch.bfloat16)
METHOD = st.sampled_from(methods(factored=True))
SEED = st.integers(0, 2**16)


@st.composite
def linears(draw: Any) -> tuple[str, nn.Module, Tensor]:
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    seeded(draw(SEED))
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
    seeded(draw(SEED))
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


def defined(method: Factored, layer: nn.Module, kind: LayerKind) -> bool:
    """Whether a drawn layer's matrices are large enough for the method."""
    m, n = kind.to_matrix(layer, layer.weight).shape[-2:]
    return m >= method.smallest[0] and n >= method.smallest[1]


@settings(max_examples=120)
@given(case=st.one_of(linears(), convolutions()), method=METHOD, seed=SEED)
def test_drawn_layers(case: tuple[str, nn.Module, Tensor], method: Factored, seed: int):
    """One walk through every state on a drawn layer in float64."""
    name, layer, x = case
    note(f"{layer} on {tuple(x.shape)} with {method}")
    kind = KINDS[name]()
    assume(defined(method, layer, kind))
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
    name, wide, x = case
    kind, x = KINDS[name](), x.to(dtype)
    assume(defined(method, wide, kind))
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
