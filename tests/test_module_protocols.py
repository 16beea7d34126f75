"""An adapted layer is a plain ``nn.Module`` to whoever deletes, replaces, lists or copies parameters."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from helpers import close, perturb
from torch import Tensor, nn

from svdpeft import PiSSA, attach
from svdpeft.adapter.adapter import Adapter


class Reads(nn.Module):
    """A parent that reads the weight of one layer, and calls the other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 18, bias=False), nn.Linear(18, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.tanh(nn.functional.linear(x, self.qkv.weight)))


def adapted() -> tuple[Reads, Adapter, Tensor]:
    torch.manual_seed(0)
    model = Reads().double()
    adapter = attach(model, PiSSA(rank=2), targets=["qkv", "proj"])
    perturb(adapter)
    return model, adapter, torch.randn(2, 6, dtype=torch.float64)


@pytest.mark.parametrize("name", ["qkv", "proj"])
def test_a_parameter_can_be_deleted_and_registered_again(name: str):
    """What FSDP does with ``use_orig_params``, and weight_norm, and quantisers."""
    model, _, x = adapted()
    plain = Reads().double()
    expected = model(x)
    for layer in (model.get_submodule(name), plain.get_submodule(name)):
        weight = layer._parameters["weight"]
        del layer.weight
        assert not hasattr(layer, "weight")
        assert "weight" not in dict(layer.named_parameters(recurse=False))
        with pytest.raises(AttributeError, match="weight"):
            _ = layer.weight
        layer.register_parameter("weight", weight)
        assert hasattr(layer, "weight")
    close(model(x), expected)


@pytest.mark.parametrize("name", ["qkv", "proj"])
def test_a_tensor_can_stand_in_its_place(name: str):
    """FSDP and data parallel replicas put plain tensors there for a forward."""
    model, _, x = adapted()
    expected = model(x)
    layer: Any = model.get_submodule(name)
    weight = layer._parameters["weight"]
    del layer.weight
    layer.weight = weight.detach().clone()  # no parameter
    assert hasattr(layer, "weight")
    close(model(x), expected)
    del layer.weight
    assert not hasattr(layer, "weight")
    layer.weight = weight
    assert layer._parameters["weight"] is weight
    close(model(x), expected)


def test_what_is_listed():
    model, _, _ = adapted()
    plain = Reads()
    for name in ("qkv", "proj"):
        ours, theirs = model.get_submodule(name), plain.get_submodule(name)
        assert type(ours).__name__ == type(theirs).__name__
        assert isinstance(ours, nn.Linear)
        assert set(dir(theirs)) - set(dir(ours)) == set()
        assert {n for n, _ in ours.named_parameters() if ".svdpeft." not in f".{n}."} == dict(
            theirs.named_parameters()
        ).keys()
        assert ours.get_parameter("weight") is ours._parameters["weight"]


def test_copies():
    model, _, x = adapted()
    expected = model(x)
    for other in (copy.deepcopy(model), pickled(model)):
        close(other(x), expected)
    shallow: Any = copy.copy(model.proj)
    hidden = torch.randn(2, 18, dtype=torch.float64)
    close(shallow(hidden), model.proj(hidden))
    assert shallow._parameters["weight"] is model.proj._parameters["weight"]


def pickled(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_weights_alone_are_pickled_and_read_safely():
    model, _, x = adapted()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other, adapter, _ = adapted()
    perturb(adapter, seed=3)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))
    parameters = io.BytesIO()
    torch.save(list(model.parameters()), parameters)
    parameters.seek(0)
    assert len(torch.load(parameters, weights_only=True)) == len(list(model.parameters()))


def test_functional_calls_take_what_they_are_given():
    model, _, x = adapted()
    expected = model(x)
    state = dict(model.state_dict())
    close(torch.func.functional_call(model, state, (x,)), expected)
    zeros = {n: torch.zeros_like(t) if n.endswith((".L", ".L0")) else t for n, t in state.items()}
    base = Reads().double()
    base.load_state_dict({n: t for n, t in state.items() if ".svdpeft." not in n})
    close(torch.func.functional_call(model, zeros, (x,)), base(x))


@pytest.mark.filterwarnings("ignore")  # FSDP's own
def test_fully_sharded_with_the_original_parameters():
    """FSDP1 deletes every parameter, and puts a view of its flat one in the place for a forward."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, adapter, x = adapted()
    expected = model(x).detach()
    model(x).sum().backward()
    gradients = {name: p.grad.clone() for name, p in adapter.named_parameters()}
    for p in model.parameters():
        p.grad = None
    names = [name for name, _ in adapter.named_parameters()]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        out = wrapped(x)
        close(out.detach(), expected)
        out.sum().backward()
        assert [name for name, _ in adapter.named_parameters()] == names
        for name, p in adapter.named_parameters():
            assert p.grad is not None
            close(p.grad.view_as(gradients[name]), gradients[name])
    finally:
        dist.destroy_process_group()
