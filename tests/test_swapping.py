"""An adapter in memory, and the values of one in the tensors of another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import perturb
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import svdpeft
from svdpeft import OFT, SORSA, CheckpointError, LoRA, PiSSA, attach, load
from svdpeft.adapter.file import State

LINEAR = ("linear", 0)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


def test_a_state_goes_through_a_checkpoint_of_torch(x: Tensor, tmp_path: Path):
    adapter = attach(net(), SORSA(rank=2), ["0", "2"], train=["4"])
    perturb(adapter)
    torch.save({"state_dict": adapter.state_dict()}, tmp_path / "last.ckpt")
    other = attach(net(), SORSA(rank=2), ["0", "2"], train=["4"])
    other.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(other.model(x), adapter.model(x))


def test_a_compiled_model_is_not_compiled_again(x: Tensor):
    states, expected = [], []
    for i, method in enumerate((LoRA(rank=1), PiSSA(rank=3), SORSA(rank=2), LoRA(rank=6, alpha=2))):
        model = net()
        adapter = attach(model, method, ["0", "2"], train=["4"])
        perturb(adapter, 0.1 * (i + 1))
        states.append(adapter.state_dict())
        expected.append(model(x).detach())
    model = net()
    slot = attach(model, LoRA(rank=6), ["0", "2"], train=["4"])
    pointers = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for state, out in zip(states, expected, strict=True):
                slot.load_state_dict(state)
                torch.testing.assert_close(compiled(x), out, atol=1e-5, rtol=1e-5)
    assert pointers == [t.data_ptr() for t in (*model.parameters(), *model.buffers())]


def test_what_the_values_do_not_have_is_the_base(x: Tensor):
    model = net()
    base = model(x)
    slot = attach(model, LoRA(rank=4), ["0", "2"], train=["4"])
    perturb(slot)
    part = net()
    other = attach(part, LoRA(rank=2), ["0"])
    perturb(other)
    slot.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(x), part(x))
    other.detach()
    slot.load_state_dict(attach(part, LoRA(rank=1), ["2"]).state_dict())
    assert torch.equal(model(x), base)


def test_what_does_not_fit_changes_nothing(x: Tensor):
    model = net()
    slot = attach(model, LoRA(rank=2), ["0", "2"])
    perturb(slot)
    before = slot.state_dict()
    cases = {
        "has an update of rank 6, and LoRA(rank=2) has room for 2": (net(), PiSSA(rank=3), ["0"], {}),
        "has an update of full rank": (net(), OFT(block_size=2), ["0"], {}),
        "the values have a site 4, which the attached adapter does not have": (net(), LoRA(rank=1), ["4"], {}),
        "which the attached adapter does not train whole": (net(), LoRA(rank=1), ["0"], {"train": ["4"]}),
        "was made for another base: the first weight that differs is 0": (net(1), LoRA(rank=1), ["0"], {}),
    }
    for words, (other, method, targets, options) in cases.items():
        adapter = attach(other, method, targets, **options)
        perturb(adapter, 0.3)
        with pytest.raises(CheckpointError, match=words.replace("(", r"\(").replace(")", r"\)")):
            slot.load_state_dict(adapter.state_dict())
        after = slot.state_dict()
        assert all(torch.equal(t, after.tensors[name]) for name, t in before.tensors.items())
    slot.load_state_dict(attach(net(1), LoRA(rank=1), ["0"]).state_dict(), check_base=False)
    pissa = attach(net(), PiSSA(rank=2), ["0", "2"])
    with pytest.raises(CheckpointError, match=r"the values at 0 are of LoRA.* attach LoRA\(rank=…\)"):
        pissa.load_state_dict(before)
    with pytest.raises(CheckpointError, match="the state is damaged or cut off"):
        load(net(), State({}, {}))
    with pytest.raises(CheckpointError, match="has format None"):
        load(net(), State({}, {"adapter.json": "{}"}))


def test_a_file_of_another_tool_is_named(tmp_path: Path):
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors.* has format None"):
        load(net(), tmp_path / "other.safetensors")


def test_while_it_is_off(x: Tensor):
    model = net()
    base = model(x)
    slot = attach(model, LoRA(rank=4), ["0"], train=["4"])
    other = net()
    adapter = attach(other, LoRA(rank=2), ["0"], train=["4"])
    perturb(adapter)
    slot.disable()
    slot.load_state_dict(adapter.state_dict())
    assert torch.equal(model(x), base)
    slot.enable()
    torch.testing.assert_close(model(x), other(x))


def test_the_state_is_a_copy_and_its_file_is_the_adapters(tmp_path: Path):
    model = net()
    adapter = attach(model, SORSA(rank=2), ["0"])
    state = adapter.state_dict()
    adapter.save(tmp_path)
    perturb(adapter)
    for name, tensor in load_file(tmp_path / "adapter.safetensors").items():
        assert torch.equal(tensor, state.tensors[name])
    svdpeft.load(net(), tmp_path / "adapter.safetensors")


class Wrapped(nn.Module):
    """The same layers under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)


def test_modules_that_have_other_names(x: Tensor, tmp_path: Path):
    model = net()
    adapter = attach(model, svdpeft.VeRA(rank=2), ["0", "2"], train=["4"])
    perturb(adapter)
    adapter.save(tmp_path)
    out = model(x)
    moved = Wrapped().eval()
    loaded = load(moved, tmp_path, rename={"": "backbone."})
    assert torch.equal(moved(x), out)
    assert list(loaded.whole) == ["backbone.4.weight", "backbone.4.bias"]
    back = load(net(), loaded.state_dict(), rename={"backbone.": ""})
    assert back.state_dict().tensors.keys() == adapter.state_dict().tensors.keys()
    with pytest.raises(CheckpointError, match=r"rename: no name begins with 'model\.': they are 0, 2"):
        load(Wrapped(), tmp_path, rename={"model.": "backbone."})
    deep = nn.Sequential(*[nn.Linear(3, 3) for _ in range(12)])
    state = attach(deep, LoRA(rank=1), ["1", "11"]).state_dict()
    other = nn.ModuleDict({"x": deep[1], "11": deep[11]})
    for adapter in svdpeft.adapters(deep).values():
        adapter.detach()
    assert list(load(other, state, rename={"1": "x"}).sites) == ["x", "11"]  # whole parts of a name
    bare = attach(nn.Linear(3, 3), LoRA(rank=1), bias=True)
    held = nn.ModuleDict({"fc": bare.model})
    state = bare.state_dict()
    bare.detach()
    for beginning in ("fc", "fc."):
        found = load(held, state, rename={"": beginning})
        assert (list(found.sites), list(found.whole)) == (["fc"], ["fc.bias"])
        found.detach()
    with pytest.raises(CheckpointError, match=r"gives two names the same one"):
        load(Wrapped(), tmp_path, rename={"0": "2"})


def test_values_that_cannot_be_merged_change_nothing(x: Tensor):
    model = net().half()
    adapter = attach(model, LoRA(rank=1), ["0"])
    adapter.merge()
    before = adapter.state_dict()
    large = State({n: torch.full_like(t, 6e4) for n, t in before.tensors.items()}, before.metadata)
    with pytest.raises(ValueError, match="0 cannot be merged"):
        adapter.load_state_dict(large)
    with pytest.raises(CheckpointError, match="the values are not finite"):
        adapter.load_state_dict(State({n: t / 0 for n, t in large.tensors.items()}, before.metadata))
    assert adapter.state == "merged"
    assert all(torch.equal(t, before.tensors[n]) for n, t in adapter.state_dict().tensors.items())


def test_another_view_of_a_weight_is_refused():
    def raw() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Module()
        model.w = nn.Parameter(torch.randn(6, 6))
        return model

    state = attach(raw(), LoRA(rank=2), ["w[in,out]"]).state_dict()
    with pytest.raises(CheckpointError, match="w is another use, or another view, of its weight"):
        attach(raw(), LoRA(rank=2), ["w[out,in]"]).load_state_dict(state)


def test_half_precision_factors_keep_their_rank():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False)).double()
    pair = [attach(model, LoRA(rank=4), ["0"], name=name) for name in "ab"]
    for i, adapter in enumerate(pair):
        perturb(adapter, 1e-4 if i else 1.0)
    model.bfloat16()
    made = svdpeft.combine([(adapter, 1.0) for adapter in pair])
    exact = sum(adapter.delta("0").double() for adapter in pair)
    found = made.adapter.sites["0"].method.product(made.adapter.sites["0"].factors).dense().double()
    torch.testing.assert_close(found, exact, atol=float(exact.abs().max()) / 50, rtol=0)
    assert made.adapter.sites["0"].method.rank == 8
    with pytest.raises(CheckpointError, match="has an update of rank 4"):
        attach(model, LoRA(rank=2), ["0"], name="slot").load_state_dict(pair[0].state_dict())
