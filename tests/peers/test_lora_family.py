"""MiSS, DeLoRA, LoHa, LoKr and GraLoRA against Hugging Face PEFT: the same numbers are the same update."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import close, perturb
from torch import Tensor, nn

import svdpeft

peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

Put = Callable[[Any, Any], None]


def set_to(parameters: Any, value: Tensor) -> None:
    assert parameters["default"].shape == value.shape
    parameters["default"].data.copy_(value)


def loha(layer: Any, f: Any) -> None:
    for name, value in (("w1_a", f.L), ("w1_b", f.A), ("w2_a", f.L2), ("w2_b", f.A2)):
        set_to(getattr(layer, f"hada_{name}"), value)


def lokr(layer: Any, f: Any) -> None:
    for name, value in (("w1", f.C), ("w2_a", f.L), ("w2_b", f.A)):
        set_to(getattr(layer, f"lokr_{name}"), value)


def miss(layer: Any, f: Any) -> None:
    set_to(layer.miss_block, f.L.mT)


def gralora(layer: Any, f: Any) -> None:
    """Their A of input block j has rows for every output block; their B of output block i, columns for every j."""
    set_to(layer.gralora_A, f.A.mT)
    set_to(layer.gralora_B, f.L.mT)


CASES: dict[str, tuple[Any, Any, Put]] = {
    "miss": (svdpeft.MiSS(rank=4), lambda: peft.MissConfig(r=4), miss),
    "miss, cut": (
        svdpeft.MiSS(rank=7),
        lambda: peft.MissConfig(r=7),
        miss,
    ),
    "loha": (svdpeft.LoHa(rank=2, alpha=6), lambda: peft.LoHaConfig(r=2, alpha=6), loha),
    "lokr": (svdpeft.LoKr(rank=2, alpha=6), lambda: peft.LoKrConfig(r=2, alpha=6), lokr),
    "gralora": (
        svdpeft.GraLoRA(rank=4, alpha=6, grid=2),
        lambda: peft.GraloraConfig(r=4, alpha=6, gralora_k=2, hybrid_r=0),
        gralora,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_are_the_same_update(case: str):
    method, make, put = CASES[case]
    config = make()
    config.target_modules = ["0"]
    base = nn.Sequential(nn.Linear(24, 16)).double()
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).double()
    adapter = svdpeft.attach(base, method, ["0"])
    perturb(adapter)
    put(theirs.base_model.model[0], adapter.sites["0"].factors)
    x = torch.randn(5, 24).double()
    close(base(x), theirs(x))
    assert not torch.allclose(base(x), theirs.get_base_model()[0].base_layer(x))


def test_delora():
    """The known difference: PEFT starts with L at zero, we with the start subtracted."""
    config = peft.DeloraConfig(r=3, delora_lambda=5, target_modules=["0"])
    base = nn.Sequential(nn.Linear(24, 16)).double()
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).double()
    layer = theirs.base_model.model[0]
    adapter = svdpeft.attach(base, svdpeft.DeLoRA(rank=3, strength=5.0), ["0"])
    f, found = adapter.sites["0"].factors, []
    for moves in (False, True):
        if moves:
            perturb(adapter)
        for name, value in (("A", f.A), ("B", f.L), ("lambda", f.strength)):
            set_to(getattr(layer, f"delora_{name}"), value)
        layer.delora_w_norm["default"] = f.w.detach()  # theirs was taken in float32
        found.append(layer.get_delta_weight("default").detach())
    close(adapter.delta("0"), found[1] - found[0])
