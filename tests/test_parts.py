"""Parts of fused projections, raw parameters by name, and what cannot be adapted."""

from __future__ import annotations

import itertools
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import close, differs, perturb, refused
from torch import Tensor, nn

from svdpeft import SORSA, LoRA, PiSSA, attach, load
from svdpeft.layers.raw import Raw


class Attention(nn.Module):
    """timm's fused attention, single head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(torch.softmax(q @ k.mT, -1) @ v)


def vit(depth: int = 2, width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Attention(width) for _ in range(depth))).double()


def test_parts_are_chosen_one_by_one_with_factors_of_their_own():
    model, x = vit(), torch.randn(2, 3, 4, dtype=torch.float64)
    before = model[0].qkv.weight.detach().clone()
    adapter = attach(model, PiSSA(rank=2), targets=["qkv[q,v]"])
    assert list(adapter.sites) == ["0.qkv[q]", "0.qkv[v]", "1.qkv[q]", "1.qkv[v]"]
    assert adapter.skipped["0.qkv[k]"] == "not in targets"
    for i, part in ((0, "q"), (2, "v")):
        site = adapter.sites[f"0.qkv[{part}]"]
        u, s, vh = torch.linalg.svd(before.chunk(3)[i])
        product = site.method.anchor(site.factors).dense()  # the principal part of this part, not of the stack
        close(product.detach(), u[:, :2] @ torch.diag(s[:2]) @ vh[:2])
    perturb(adapter)
    expected = model(x)
    delta = adapter.delta("0.qkv[q]") + adapter.delta("0.qkv[v]")
    assert bool((delta.chunk(3)[1] == 0).all()), "the keys are left alone"
    adapter.merge()
    close(model(x), expected)
    close(model[0].qkv.weight.detach(), before + delta)


def test_each_part_its_own_method_and_the_rest_by_a_broader_rule():
    model = vit(1)
    adapter = attach(model, targets={"qkv[q]": SORSA(rank=3), "qkv[v]": LoRA(rank=1), "all-linear": PiSSA(rank=2)})
    assert {name: (site.method.name, site.method.rank) for name, site in adapter.sites.items()} == {
        "0.qkv[q]": ("sorsa", 3),
        "0.qkv[k]": ("pissa", 2),
        "0.qkv[v]": ("lora", 1),
        "0.proj": ("pissa", 2),
    }
    adapter.detach()
    adapter = attach(model, LoRA(rank=1), targets=["qkv[q,k,v]"], exclude=["qkv[k]"])
    assert list(adapter.sites) == ["0.qkv[q]", "0.qkv[v]"]
    assert adapter.skipped["0.qkv[k]"] == "excluded by 'qkv[k]'"


def test_parts_survive_a_file(tmp_path: Any):
    model, x = vit(), torch.randn(2, 3, 4, dtype=torch.float64)
    adapter = attach(model, SORSA(rank=2), targets=["qkv[q,v]"])
    perturb(adapter)
    expected = model(x)
    adapter.save(tmp_path / "a")
    again = vit()
    loaded = load(again, tmp_path / "a")
    assert torch.equal(again(x), expected)
    assert list(loaded.sites) == list(adapter.sites)
    assert loaded.skipped == adapter.skipped
    loaded.merge()
    close(again(x), expected)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["qkv[z]"], ["0.qkv", "no part 'z'", "q, k, v"]),
        (["proj[q]"], ["0.proj", "no part 'q'", "not known to be made of parts"]),
        (["qkv[in,out]"], ["0.qkv", "linear", "knows its axes"]),
    ],
    ids=str,
)
def test_a_part_that_does_not_exist(targets: list[str], words: list[str]):
    model = vit(1)
    with refused(model, *words):
        attach(model, LoRA(rank=1), targets=targets)


def test_brackets_of_a_regular_expression_stay_what_they_are():
    model = nn.ModuleDict({f"layer{i}": nn.Linear(3, 4) for i in range(4)})
    assert list(attach(model, LoRA(rank=1), targets=r"layer[0-2]").sites) == ["layer0", "layer1", "layer2"]
    assert list(attach(model, LoRA(rank=1), targets=r"layer[^0]", name="b").sites) == ["layer1", "layer2", "layer3"]


# -- the order of the rows in models that others wrote: what is called q, k or v is that -----------------------------


def gpt2(**options: Any) -> tuple[nn.Module, str]:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=20, n_positions=8)), "h.0.attn.c_attn"


def neox() -> tuple[nn.Module, str]:
    from transformers import GPTNeoXConfig, GPTNeoXModel

    config = GPTNeoXConfig(
        hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=12, vocab_size=20
    )
    return GPTNeoXModel(config), "layers.0.attention.query_key_value"


def bloom() -> tuple[nn.Module, str]:
    from transformers import BloomConfig, BloomModel

    return BloomModel(
        BloomConfig(hidden_size=8, n_head=2, n_layer=1, vocab_size=20)
    ), "h.0.self_attention.query_key_value"


def phi3() -> tuple[nn.Module, str]:
    from transformers import Phi3Config, Phi3Model

    config = Phi3Config(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        intermediate_size=12,
        vocab_size=20,
        pad_token_id=0,
    )
    return Phi3Model(config), "layers.0.self_attn.qkv_proj"


def timm_vit() -> tuple[nn.Module, str]:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=1, num_heads=2, num_classes=5)
    return model, "blocks.0.attn.qkv"


def timm_maxvit() -> tuple[nn.Module, str]:
    from timm.models.maxxvit import AttentionCl

    return nn.Sequential(AttentionCl(8, dim_head=4, head_first=True)), "0.qkv"


def timm_tinyvit() -> tuple[nn.Module, str]:
    from timm.models.tiny_vit import Attention

    return nn.Sequential(Attention(8, key_dim=4, num_heads=2, attn_ratio=1, resolution=(1, 5))), "0.qkv"


def timm_efficientformer() -> tuple[nn.Module, str]:
    from timm.models.efficientformer import Attention

    return nn.Sequential(Attention(8, key_dim=2, num_heads=2, attn_ratio=4, resolution=(1, 5))), "0.qkv"


def bigcode() -> tuple[nn.Module, str]:
    with warnings.catch_warnings():  # transformers 5.17 compiles parts of it with what torch has deprecated
        warnings.filterwarnings("ignore", "`torch.jit.script`", DeprecationWarning)
        from transformers import GPTBigCodeConfig, GPTBigCodeModel

    config = GPTBigCodeConfig(n_embd=8, n_head=2, n_layer=1, vocab_size=20, n_positions=8, multi_query=False)
    return GPTBigCodeModel(config), "h.0.attn.c_attn"


BUILDS = [gpt2, neox, bloom, phi3, bigcode, timm_vit, timm_maxvit, timm_tinyvit, timm_efficientformer]


@pytest.mark.parametrize("build", BUILDS, ids=lambda f: f.__name__)
def test_rows_are_what_they_are_called(build: Any):
    """Softmax forgets a constant in all keys of a head; the attention is linear in its values; queries do neither.

    A bias on the rows of a part, zero in all the others, shows which it is: on k nothing changes.
    """
    torch.manual_seed(0)
    model, name = build()
    model = model.double().eval()
    layer = model.get_submodule(name)
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=torch.float64))
    adapter = attach(model, LoRA(rank=1), targets=[f"{name.rpartition('.')[2]}[q,k,v]"])
    x = torch.tensor([[3, 1, 7, 2]])
    if name.startswith("blocks"):
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    elif name.startswith("0"):
        x = torch.randn(2, 5, 8, dtype=torch.float64)

    def run() -> Tensor:
        out = model(x)
        return getattr(out, "last_hidden_state", out).detach()

    changed = {}
    base, rotary = run(), name.startswith("layers")
    start = layer.bias.detach().clone()
    for part in "qkv":
        kind, total = adapter.sites[f"{name}[{part}]"].kind, layer.bias.shape[0]
        rows = torch.zeros(total).scatter(0, torch.cat([torch.arange(*r) for r in kind.rows]), 1.0).double()
        with torch.no_grad():
            layer.bias.copy_(start + rows * torch.linspace(1.0, 2.0, total).double())
        changed[part] = float((run() - base).abs().max())
        layer.bias.data.copy_(start)
    if not rotary:  # a rotation by the position makes of a constant something else
        assert changed["k"] < 1e-12 < 1e-4 < min(changed["q"], changed["v"])
        return
    # With rotary positions: without any values the output cannot depend on queries and keys.
    site = adapter.sites[f"{name}[v]"]
    rows = torch.cat([torch.arange(*r) for r in site.kind.rows])
    with torch.no_grad():
        layer.weight[rows] = 0
        layer.bias[rows] = 0
        silent = run()
        others = torch.tensor([i for i in range(layer.out_features) if i not in set(rows.tolist())])
        layer.weight[others] *= -3
        close(run(), silent)
    sizes = {part: sum(len(range(*r)) for r in adapter.sites[f"{name}[{part}]"].kind.rows) for part in "qkv"}
    assert sizes["k"] == sizes["v"] <= sizes["q"]


def test_gate_and_up_of_experts_and_of_a_fused_layer():
    from transformers import MixtralConfig, MixtralModel

    config = MixtralConfig(
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        vocab_size=20,
        experts_implementation="eager",
    )
    torch.manual_seed(0)
    model = MixtralModel(config).double().eval()
    adapter = attach(model, PiSSA(rank=2), targets=["experts.gate_up_proj[up]", "experts.down_proj"])
    assert {name: site.shape for name, site in adapter.sites.items()} == {
        "layers.0.mlp.experts.gate_up_proj[up]": (3, 6, 8),
        "layers.0.mlp.experts.down_proj": (3, 8, 6),
    }
    ids = torch.tensor([[1, 5, 9, 2, 7, 3, 4, 8, 6]])
    base = model(ids).last_hidden_state
    perturb(adapter)
    out = model(ids).last_hidden_state
    assert differs(out, base)
    adapter.merge()
    close(model(ids).last_hidden_state, out)


# -- raw parameters ------------------------------------------------------------------------------------------------


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spectral = nn.Parameter(torch.randn(2, 3, 5, 4, dtype=torch.float64))  # part, in, out, mode
        self.left = nn.Parameter(torch.randn(3, 6, dtype=torch.float64))
        self.position = nn.Parameter(torch.randn(1, 4, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.fft.rfft((x + self.position) @ self.left, n=6, dim=-2)  # (b, 4 modes, 6)
        w = torch.complex(*self.spectral.unbind())
        return torch.fft.irfft(torch.einsum("bmi,iom->bmo", modes[..., :3], w), n=6, dim=-2)


def test_a_raw_parameter_in_either_orientation_and_as_a_batch():
    torch.manual_seed(0)
    model = nn.ModuleDict({"net": Spectral()})
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    base = model["net"](x)
    adapter = attach(model, PiSSA(rank=2), targets=["spectral[part,in,out,mode]", "left[in,out]"])
    assert {n: s.shape for n, s in adapter.sites.items()} == {"net.spectral": (8, 5, 3), "net.left": (1, 6, 3)}
    assert adapter.skipped == {"net.position": "a raw parameter; name it to adapt it"}
    w = model["net"]._parameters["spectral"].detach()
    u, s, vh = torch.linalg.svd(w[1, :, :, 2].T)  # one SVD per part and mode
    site = adapter.sites["net.spectral"]
    close(site.method.anchor(site.factors).dense()[1, 2].detach(), u[:, :2] * s[:2] @ vh[:2])
    perturb(adapter)
    out = model["net"](x)
    assert differs(out, base)
    adapter.merge()
    close(model["net"](x), out)
    adapter.detach()
    adapter = attach(model, LoRA(rank=1), targets=["net.left", "position"])  # as stored: (…, out, in)
    assert {n: s.shape for n, s in adapter.sites.items()} == {"net.left": (1, 3, 6), "net.position": (1, 4, 3)}


@pytest.mark.parametrize("axes", [*itertools.permutations(("in", "out", "mode"))], ids=",".join)
def test_axes_in_any_order_come_back(axes: tuple[str, ...]):
    """Of six orders two are not their own inverse."""
    sizes = {"in": 3, "out": 5, "mode": 2}
    w, kind = torch.randn([sizes[axis] for axis in axes]), Raw(axes)
    matrix = kind.to_matrix(nn.Module(), w)
    assert matrix.shape == (2, 5, 3)
    assert torch.equal(kind.from_matrix(nn.Module(), matrix), w)


def test_raw_parameters_survive_a_file(tmp_path: Any):
    torch.manual_seed(0)
    model = nn.ModuleDict({"net": Spectral()})
    adapter = attach(model, SORSA(rank=2), targets=["spectral[part,in,out,mode]"])
    perturb(adapter)
    adapter.save(tmp_path / "a")
    expected = model["net"].spectral.detach()
    adapter.detach()
    loaded = load(model, tmp_path / "a")
    assert torch.equal(model["net"].spectral.detach(), expected)
    assert loaded.sites["net.spectral"].shape == (8, 5, 3)


def test_broad_targets_and_regular_expressions_leave_raw_parameters_alone():
    model = nn.ModuleDict({"net": Spectral(), "linear": nn.Linear(3, 4)})
    for targets in ("all", ".*"):
        adapter = attach(model, LoRA(rank=1), targets=targets)
        assert list(adapter.sites) == ["linear"]
        adapter.detach()
    assert "net.spectral" in attach(model, LoRA(rank=1), targets=".*spectral[part,in,out,mode]").sites


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("spectral[in,out]", ["net.spectral has 4 axes", "[2, 3, 5, 4]", "[in,out]"]),
        ("spectral[a,a,in,out]", ["net.spectral has 4 axes"]),
        ("spektral[part,in,out,mode]", ["spectral"]),
    ],
)
def test_axes_that_do_not_fit(target: str, words: list[str]):
    model = nn.ModuleDict({"net": Spectral()})
    with refused(model, *words):
        attach(model, LoRA(rank=1), targets=[target])


# -- what cannot be adapted ------------------------------------------------------------------------------------------


def test_a_rank_larger_than_one_expert():
    model = nn.ModuleDict({"net": Spectral()})
    with refused(model, "rank 4", "[1, 3]", "net.spectral", "5x3"):
        attach(model, LoRA(rank=4), targets=["spectral[part,in,out,mode]"])


class Quantised(nn.Parameter):
    """Stands for a weight of a library that is not known here: four bits packed in a byte."""


@pytest.mark.parametrize("how", ["integer", "subclass", "eight bits", "complex"])
def test_a_weight_stored_in_an_unknown_way(how: str):
    layer = nn.Linear(6, 4, bias=False)
    values = {
        "integer": nn.Parameter(torch.zeros(4, 6, dtype=torch.int8), requires_grad=False),
        "subclass": torch.Tensor._make_subclass(Quantised, torch.randn(4, 6)),
        "eight bits": nn.Parameter(torch.randn(4, 6).to(torch.float8_e4m3fn), requires_grad=False),
        "complex": nn.Parameter(torch.randn(4, 6, dtype=torch.complex64)),
    }
    layer.weight = values[how]
    model = nn.ModuleDict({"packed": layer, "plain": nn.Linear(6, 4)})
    words = ["packed", "view_as_complex"] if how == "complex" else ["packed", "quantised", str(layer.weight.dtype)]
    with refused(model, *words):
        attach(model, LoRA(rank=2), targets=["packed", "plain"])
    with nullcontext() if how == "complex" else pytest.warns(UserWarning, match=r"^packed is not adapted: .*quantised"):
        adapter = attach(model, LoRA(rank=2))
    assert list(adapter.sites) == ["plain"]
    assert words[1] in adapter.skipped["packed"]
    attach(model, LoRA(rank=2), ["plain"], name="named")  # and no warning


def test_a_parameter_that_is_a_view_of_another():
    model = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(6, 2), "c": nn.Linear(6, 3)})
    model["b"].weight = nn.Parameter(model["a"].weight.data[1:3])
    with refused(model, "b", "shares memory with a", "view"):
        attach(model, LoRA(rank=2), targets=["b"])
    with refused(model, "a", "shares memory with b"):
        attach(model, LoRA(rank=2), targets=["a"])
    adapter = attach(model, LoRA(rank=2))
    assert list(adapter.sites) == ["c"]
    assert "view" in adapter.skipped["b"]


def test_disjoint_slices_of_one_buffer_are_no_views_of_each_other():
    model = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(6, 2)})
    flat = torch.randn(36)
    model["a"].weight, model["b"].weight = nn.Parameter(flat[:24].view(4, 6)), nn.Parameter(flat[24:].view(2, 6))
    assert len(attach(model, LoRA(rank=2)).sites) == 2


def test_recurrent_layers_keep_their_own_references():
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 3), "head": nn.Linear(3, 2)})
    with refused(model, "rnn.weight_ih_l0", "LSTM"):
        attach(model, LoRA(rank=1), targets=["weight_ih_l0"])
