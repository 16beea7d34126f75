"""Parameters that train whole in half precision: said when they are attached, and the way out works."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from svdpeft import HeadOnly, LoRA, attach


def net(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "why"),
    [
        (torch.float16, "a gradient scaler refuses its gradients"),
        (torch.bfloat16, "a step below 1/256 of a value is lost"),
    ],
)
def test_it_is_said(dtype: torch.dtype, why: str):
    words = rf"2\.weight trains whole in {dtype}, and 1 more: {why}.*get_submodule\('2'\)\.float\(\)"
    with pytest.warns(UserWarning, match=words):
        attach(net(dtype), LoRA(rank=1), ["0"], train=["2"])


def test_factors_and_float32_are_no_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(net(torch.bfloat16), LoRA(rank=1), ["0"])
        attach(net(torch.float32), LoRA(rank=1), ["0"], train=["2"])


def test_the_way_out_trains_as_far_as_float32_does():
    """The share of the way of a float32 head: in bfloat16 most of the steps are lost."""

    def way(dtype: torch.dtype, out: bool) -> float:
        model = net(dtype)
        if out:
            model.get_submodule("2").float()
        adapter = attach(model, HeadOnly(), train=["2"])
        start = model[2].weight.detach().float().clone()
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4, weight_decay=0)
        x, labels = torch.randn(32, 6, dtype=dtype), torch.randint(0, 3, (32,))
        for _ in range(50):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
                loss = F.cross_entropy(model(x).float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return float((model[2].weight.detach().float() - start).norm())

    whole = way(torch.float32, out=False)
    assert way(torch.bfloat16, out=True) == pytest.approx(whole, rel=0.1)
    with pytest.warns(UserWarning, match="hardly moves"):
        assert way(torch.bfloat16, out=False) < 0.5 * whole
