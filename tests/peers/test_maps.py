"""HiRA, (IA)³, HRA, RoAd, FourierFT, SHiRA and C3A against Hugging Face PEFT, where it is installed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import differs, perturb
from torch import Tensor, nn

import svdpeft
from svdpeft.adapter.adapter import Adapter

peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


def pair(config: Any, method: Any, layer: nn.Module | None = None) -> tuple[nn.Module, nn.Module, Any, Adapter]:
    """Our model and theirs around equal layers, ours off its start; their adapter layer, our adapter."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 6, bias=False) if layer is None else layer).double()
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).double()
    adapter = svdpeft.attach(base, method, ["0"])
    x = torch.randn(3, 12).double()
    if layer is None and method.exact_start:
        torch.testing.assert_close(theirs(x), base(x))
    perturb(adapter)
    return base, theirs, theirs.base_model.model[0], adapter


def give(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values.detach().reshape(parameter.shape))


def same(ours: nn.Module, theirs: nn.Module, rtol: float = 1e-7, gradients: bool = True) -> None:
    """The same outputs, and the same gradients of the input."""
    found = []
    for model in (ours, theirs):
        x = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        out = model(x)
        out.sin().sum().backward()
        found.append((out, x.grad) if gradients else (out,))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("rank", [2, 5])
def test_hira(rank: int):
    config = peft.HiraConfig(r=rank, target_modules=["0"])
    ours, theirs, layer, adapter = pair(config, svdpeft.HiRA(rank=rank))
    f = adapter.sites["0"].factors
    assert float(layer.hira_A["default"].abs().max()) <= 12**-0.5  # the start's distribution
    give(layer.hira_A["default"], f.A)
    give(layer.hira_B["default"], f.L)
    same(ours, theirs)


@pytest.mark.parametrize("side", ["output", "input"])
def test_ia3(side: Any):
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if side == "input" else [])
    ours, theirs, layer, adapter = pair(config, svdpeft.IA3(side=side))
    give(layer.ia3_l["default"], adapter.sites["0"].factors.l)
    same(ours, theirs)


def test_the_bias_differs_as_named():
    """Known difference: (IA)³ and RoAd of PEFT change the layer's bias, too."""
    for config, method in (
        (peft.IA3Config(target_modules=["0"], feedforward_modules=[]), svdpeft.IA3()),
        (peft.RoadConfig(target_modules=["0"], group_size=2), svdpeft.RoAd()),
    ):
        ours, theirs, layer, adapter = pair(config, method, nn.Linear(12, 6))
        f = adapter.sites["0"].factors
        if isinstance(method, svdpeft.IA3):
            give(layer.ia3_l["default"], f.l)
        else:
            give(layer.road_theta["default"], f.theta)
            give(layer.road_alpha["default"], f.alpha)
        x, bias = torch.randn(3, 12).double(), ours[0].bias
        assert differs(theirs(x), ours(x))
        plain = theirs(torch.zeros(1, 12).double())  # their bias
        torch.testing.assert_close(theirs(x) - plain, ours(x) - bias)


@pytest.mark.parametrize("rank", [2, 6])
def test_hra(rank: int):
    config = peft.HRAConfig(r=rank, target_modules=["0"])
    layer = nn.Linear(12, 6)  # its forward takes no layer without a bias
    ours, theirs, their_layer, adapter = pair(config, svdpeft.HRA(rank=rank), layer)
    u = their_layer.hra_u["default"]
    assert torch.equal(u[:, 0::2], u[:, 1::2])  # the same start
    assert float(u.abs().max()) <= (rank / 2) ** -0.5
    give(u, adapter.sites["0"].factors.U)
    same(ours, theirs)


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_road(variant: Any):
    """Known difference: PEFT pairs outputs i and i + g/2 of groups of g = 64; groups of two are the paper's pairs."""
    config = peft.RoadConfig(target_modules=["0"], group_size=2, variant=f"road_{variant}")
    ours, theirs, layer, adapter = pair(config, svdpeft.RoAd(variant))
    f = adapter.sites["0"].factors
    assert layer.road_theta["default"].numel() + layer.road_alpha["default"].numel() == adapter.trainable_count
    give(layer.road_theta["default"], f.theta)
    give(layer.road_alpha["default"], f.alpha)
    same(ours, theirs)


def test_fourierft():
    """Known difference: PEFT computes the update in float32, and draws its entries by a seed of its own."""
    config = peft.FourierFTConfig(n_frequency=7, scaling=40.0, target_modules=["0"], init_weights=True)
    ours, theirs, layer, adapter = pair(config, svdpeft.FourierFT(7, alpha=40.0))
    f = adapter.sites["0"].factors
    layer.indices["default"] = torch.stack([f.index // 12, f.index % 12])
    give(layer.fourierft_spectrum["default"], f.c)
    same(ours, theirs, rtol=1e-5)


def test_shira():
    config = peft.ShiraConfig(r=2, target_modules=["0"])
    ours, theirs, layer, adapter = pair(config, svdpeft.SHiRA(rank=2))
    f = adapter.sites["0"].factors
    assert layer.shira_weight["default"].numel() == adapter.trainable_count
    layer.shira_indices["default"] = torch.stack([f.index // 12, f.index % 12]).int()
    give(layer.shira_weight["default"], f.values)
    same(ours, theirs)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_c3a(size: int):
    """Known differences: PEFT computes the update in float32, and from b = 3 on its gradient of the input is wrong."""
    from peft.tuners.c3a.utils import BlockCircularConvolution

    config = peft.C3AConfig(block_size=size, target_modules=["0"], init_weights=True)
    ours, theirs, layer, adapter = pair(config, svdpeft.C3A(size))
    give(layer.c3a_kernel["default"], adapter.sites["0"].factors.w)
    same(ours, theirs, rtol=1e-5, gradients=size == 2)
    found = []
    for model, parameter in ((ours, adapter.sites["0"].factors.w), (theirs, layer.c3a_kernel["default"])):
        out = model(torch.randn(3, 12, generator=torch.Generator().manual_seed(2)).double())
        found.append(torch.autograd.grad(out.sin().sum(), parameter)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    x, w = torch.randn(2, 12).double().requires_grad_(), adapter.sites["0"].factors.w.detach()
    right = torch.autograd.gradcheck(lambda x: BlockCircularConvolution.apply(x, w), x, raise_exception=False)
    assert right == (size == 2), "PEFT has changed its gradient of the input: compare it with ours"
    config = peft.C3AConfig(block_size=size, target_modules=["0"])  # Xavier
    _, _, layer, adapter = pair(config, svdpeft.C3A(size, reference_init=True))
    assert float(layer.c3a_kernel["default"].abs().max()) <= (6 / 18) ** 0.5
