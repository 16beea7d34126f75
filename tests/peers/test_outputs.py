"""WaveFT and VB-LoRA against Hugging Face PEFT, on the same weights; what differs is named."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import differs, perturb
from torch import Tensor, nn

import svdpeft
from svdpeft.adapter.adapter import Adapter

peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


def both(config: Any, method: svdpeft.Method, *sizes: int) -> tuple[nn.Module, nn.Module, Adapter]:
    """Our model and theirs around equal layers, before anything has moved; sizes of what goes into each and out."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)]
    base = nn.Sequential(*layers).double()
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).double()
    return base, theirs, svdpeft.attach(base, method, "all-linear")


def give(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values.detach().reshape(parameter.shape))


def outputs(model: nn.Module, width: int) -> tuple[Tensor, Tensor]:
    """What a model gives, and a gradient of its input."""
    x = torch.randn(3, 4, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    out = model(x)
    out.sin().sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def same(ours: nn.Module, theirs: nn.Module, width: int) -> None:
    for a, b in zip(outputs(ours, width), outputs(theirs, width), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("m", "n"), [(6, 12), (7, 12), (6, 9), (5, 7)])
def test_waveft(m: int, n: int):
    """Known difference: PEFT's entries are those of seed 777 for every adapter."""
    config = peft.WaveFTConfig(n_frequency=20, scaling=4.0, target_modules=["0"])
    ours, theirs, adapter = both(config, svdpeft.WaveFT(20, alpha=4.0), n, m)
    layer, f = theirs.base_model.model[0], adapter.sites["0"].factors
    assert layer.waveft_spectrum["default"].numel() == adapter.trainable_count
    assert not layer.waveft_spectrum["default"].any()  # the same start
    same(ours, theirs, n)
    assert not torch.equal(layer.waveft_indices["default"], torch.stack([f.index // n, f.index % n]))
    perturb(adapter)
    layer.waveft_indices["default"] = torch.stack([f.index // n, f.index % n])
    assert differs(outputs(ours, n)[0], outputs(theirs, n)[0])
    give(layer.waveft_spectrum["default"], f.c)
    same(ours, theirs, n)


def test_their_waveft_without_a_transform_is_shira():
    config = peft.WaveFTConfig(n_frequency=36, scaling=4.0, target_modules=["0"], use_idwt=False)
    ours, theirs, adapter = both(config, svdpeft.SHiRA(rank=2), 12, 6)
    layer, f = theirs.base_model.model[0], adapter.sites["0"].factors
    perturb(adapter)
    layer.waveft_indices["default"] = torch.stack([f.index // 12, f.index % 12])
    give(layer.waveft_spectrum["default"], f.values / 4)
    same(ours, theirs, 12)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_vblora(k: int):
    """Known difference: PEFT starts off the base model; ``reference_init`` does so, too."""
    config = peft.VBLoRAConfig(r=2, num_vectors=5, vector_length=3, topk=k, target_modules=["0", "1"])
    method = svdpeft.VBLoRA(rank=2, vectors=5, vector_length=3, top_k=k, reference_init=True)
    ours, theirs, adapter = both(config, method, 12, 6, 9)
    bank = theirs.base_model.vblora_vector_bank["default"]
    assert bank.numel() == adapter.sites["0"].factors.bank.numel()
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == adapter.trainable_count
    base = both(config, svdpeft.LoRA(rank=1), 12, 6, 9)[0]
    for model in (ours, theirs):  # some 1e-4 per entry
        off = (outputs(model, 12)[0] - outputs(base, 12)[0]).abs().max()
        assert 1e-6 < off < 1e-2
    for move in (False, True):
        if move:
            perturb(adapter)
        give(bank, adapter.sites["0"].factors.bank)
        for i, site in adapter.sites.items():
            layer, f = theirs.base_model.model[int(i)], site.factors
            assert layer.vblora_logits_A["default"].shape == f.right.shape
            give(layer.vblora_logits_A["default"], f.right)
            give(layer.vblora_logits_B["default"], f.left.transpose(0, 1))
        same(ours, theirs, 12)
    exact = both(config, svdpeft.VBLoRA(rank=2, vectors=5, vector_length=3, top_k=k), 12, 6, 9)[0]
    assert torch.equal(outputs(exact, 12)[0], outputs(base, 12)[0])
