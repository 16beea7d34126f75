"""Every wrong call says what is wrong, where and what was meant, and leaves the model bit for bit as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import perturb, refused, snapshot
from torch import Tensor, nn

import svdpeft
from svdpeft import SORSA, SVFT, HeadOnly, LoRA, Partial, PiSSA, attach


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(8, 6), "back": nn.Linear(6, 8)}) for _ in range(2))
        self.embed = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["back"](torch.tanh(block["proj"](x)))
        return self.head(x)


@pytest.fixture
def net() -> Net:
    return Net()


def test_rank_too_large(net: Net):
    with refused(net, "rank 7 is outside [1, 6] at blocks.0.proj (6x8)"):
        attach(net, PiSSA(rank=7), targets=["proj"])
    adapter = attach(net, PiSSA(rank=7), targets="all-linear", clip_rank=True)
    assert {name: site.method.rank for name, site in adapter.sites.items()} == {
        "blocks.0.proj": 6,
        "blocks.0.back": 6,
        "blocks.1.proj": 6,
        "blocks.1.back": 6,
        "head": 3,
    }


def test_a_late_failure_leaves_the_early_sites_alone(net: Net):
    with refused(net, "rank 4 is outside [1, 3] at head (3x8)"):
        attach(net, SORSA(rank=4))


@pytest.mark.parametrize("rank", [0, -2, 2.0, True, "4"])
@pytest.mark.parametrize("clip", [False, True])
def test_impossible_ranks(net: Net, rank: Any, clip: bool):
    with refused(net, f"rank {rank!r}", "blocks.0.proj"):
        attach(net, LoRA(rank=rank), targets=["proj"], clip_rank=clip)
    with refused(net, f"rank {rank!r}", "blocks.0.proj"):
        attach(net, LoRA(rank={"proj": rank}), targets=["proj"], clip_rank=clip)


def test_rank_mapping_without_a_match(net: Net):
    with refused(net, "blocks.0.proj", "no pattern of rank={'back': 2}", "'.*' matches the rest"):
        attach(net, LoRA(rank={"back": 2}), targets=["proj"])


def test_unknown_names_get_the_near_miss(net: Net):
    with pytest.raises(ValueError, match="no method is called 'sorza': did you mean 'sorsa'"):
        svdpeft.method("sorza")
    with pytest.raises(ValueError, match="did you mean 'svft'"):
        svdpeft.cite("svftt")
    with pytest.raises(AttributeError, match="no attribute 'SORZA'"):
        _ = svdpeft.SORZA
    with refused(net, "'projj'", "did you mean 'proj'"):
        attach(net, LoRA(), targets=["projj"])
    with refused(net, "'all-linears'", "did you mean 'all-linear'"):
        attach(net, LoRA(), targets="all-linears")
    with refused(net, "train='haed'", "did you mean 'head'"):
        attach(net, LoRA(), targets=["proj"], train=("haed",))
    with refused(net, "'blocks.9'"):
        attach(net, Partial(layers=("blocks.9",)))
    adapter = attach(net, LoRA(rank=2), targets=["proj"])
    with pytest.raises(ValueError, match=r"no site is called 'block\.0\.proj': did you mean 'blocks\.0\.proj'"):
        adapter.delta("block.0.proj")


def test_one_of_several_targets_matches_nothing(net: Net):
    with refused(net, "'nope' matches no weight of the model"):
        attach(net, LoRA(rank=2), targets=["proj", "nope"])


def test_a_target_that_no_kind_adapts(net: Net):
    net.position = nn.Parameter(torch.randn(3, 4))
    with refused(net, "matches no weight of the model", "position"):
        attach(net, LoRA(rank=2), targets=[".*position"])  # a raw parameter is named, or its axes are


def test_model_without_a_layer_of_a_known_kind():
    with refused(nn.Sequential(nn.LayerNorm(4)), "the model has none of the kinds", "linear"):
        attach(nn.Sequential(nn.LayerNorm(4)), LoRA(rank=2))


def test_everything_excluded(net: Net):
    with refused(net, "targets='proj' matches no weight that can be adapted; blocks.0.proj: excluded by"):
        attach(net, LoRA(rank=2), targets=["proj"], exclude=("blocks.0.proj", "blocks.1.proj"))


def test_patterns_that_are_no_regular_expressions(net: Net):
    for options in ({"targets": ["("]}, {"exclude": ["("]}, {"train": ["("]}):
        with refused(net, "'(' is neither a name nor a regular expression"):
            attach(net, LoRA(rank=2), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [LoRA, "lora", None, 3])
def test_what_is_not_a_method(net: Net, method: Any):
    with refused(net, "method"):
        attach(net, method)
    with refused(net, "method"):
        attach(net, targets={"proj": LoRA(rank=2), "back": method})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [LoRA(rank=2), PiSSA(rank=2), SVFT()], ids=str)
def test_weights_that_are_not_finite(net: Net, method: Any, value: float):
    with torch.no_grad():
        net.blocks[1]["proj"].weight[2, 3] = value
    with refused(net, "blocks.1.proj (6x8) holds 1 NaN or infinite values of 48"):
        attach(net, method, clip_rank=True)


def test_integer_weights(net: Net):
    layer = net.blocks[1]["proj"]
    layer.weight = nn.Parameter(torch.ones(6, 8, dtype=torch.int8), requires_grad=False)
    with refused(net, "blocks.1.proj cannot be adapted: its weight is a Parameter of torch.int8"):
        attach(net, LoRA(rank=2), targets=["proj"])
    with pytest.warns(UserWarning, match=r"^blocks\.1\.proj is not adapted: its weight is a Parameter of torch\.int8"):
        assert "torch.int8" in attach(net, LoRA(rank=2)).skipped["blocks.1.proj"]


def test_meta_device():
    with torch.device("meta"):
        net = Net()
    with pytest.raises(ValueError, match=r"blocks.0.proj \(6x8\) is on the meta device: load the weights first"):
        attach(net, LoRA(rank=2))
    assert not hasattr(net, "_svdpeft")


def test_zero_weight_is_refused_by_what_starts_from_it_and_taken_by_lora(net: Net):
    nn.init.zeros_(net.blocks[1]["back"].weight)  # usual for the last layer of a residual branch
    for method in (PiSSA(rank=2), SORSA(rank=2), SVFT()):
        with refused(net, "blocks.1.back (8x6) is all zero", "LoRA"):
            attach(net, method)
    adapter = attach(net, LoRA(rank=2))
    assert "blocks.1.back" in adapter.sites


def test_names_of_adapters(net: Net):
    x = torch.randn(2, 8)
    for name in ("", "a.b"):
        with refused(net, f"adapter name {name!r}"):
            attach(net, LoRA(rank=2), name=name)
    for name in ("keys", "items", "forward", "training"):  # attributes of torch's modules
        attach(net, LoRA(rank=2), name=name).detach()
    perturb(attach(net, LoRA(rank=2)))
    out = net(x)
    with refused(net, "an adapter named 'default' is attached already"):
        attach(net, PiSSA(rank=2))
    with refused(net, "matches no weight"):
        attach(net, PiSSA(rank=2), targets=["nope"], name="two")
    with refused(net, "rank 99"):
        attach(net, PiSSA(rank=99), name="two")
    assert torch.equal(net(x), out)


def test_nothing_to_train(net: Net):
    with refused(net, "HeadOnly() would train nothing: name the parameters to train with train="):
        attach(net, HeadOnly())
    with refused(net, "would train nothing"):
        attach(net, LoRA(rank=2), targets=[])
    with pytest.raises(ValueError, match="names no layer to train"):
        Partial()


def test_the_factors_of_one_adapter_are_never_trained_whole_by_another(net: Net):
    attach(net, PiSSA(rank=2), targets=["proj"])
    with refused(net, "blocks.0.proj.weight cannot be trained whole: another adapter adapts it"):
        attach(net, svdpeft.Full(), name="full")
    others = attach(net, svdpeft.Partial(layers=("embed", "head", r".*\.bias")), name="others")
    assert not any("svdpeft" in name for name in others.whole)
    with pytest.raises(ValueError, match="names no parameter"):
        attach(net, HeadOnly(), train=(r".*svdpeft.*",), name="three")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: LoRA(dropout=1.0), r"dropout 1.0 is outside \[0, 1\)"),
        (lambda: LoRA(dropout=-0.1), "dropout -0.1"),
        (lambda: LoRA(alpha=0), "alpha 0 is not positive"),
        (lambda: PiSSA(alpha=-1.0), "alpha -1.0"),
        (lambda: SORSA(gamma=-1.0), "gamma -1.0 is negative"),
        (lambda: SORSA(mode="adam"), "mode 'adam' is not one of decoupled, gradient, loss, retract"),  # type: ignore[arg-type]
        (lambda: SORSA(norm="l1"), "norm 'l1' is not one of frobenius, squared"),  # type: ignore[arg-type]
        (lambda: SVFT(pattern="full"), "pattern 'full' is not one of plain, banded, random, topk"),  # type: ignore[arg-type]
        (lambda: SVFT(off_diagonals=-1), "off_diagonals -1 is negative"),
    ],
)
def test_hyper_parameters(build: Any, words: str):
    with pytest.raises(ValueError, match=words):
        build()


def test_unknown_driver(net: Net):
    with refused(net, "driver 'fast' is not one of"):
        attach(net, PiSSA(rank=2, driver="fast"))  # type: ignore[arg-type]


def test_fold_with_dropout(net: Net):
    adapter = attach(net, PiSSA(rank=2, dropout=0.1))
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"dropout 0.1 at blocks.0.proj.*fold\(\) needs dropout=0"):
        adapter.fold()
    assert adapter.state == "attached"
    after = snapshot(net)
    assert before == after


def test_wrong_state(net: Net):
    x = torch.randn(2, 8)
    adapter = attach(net, PiSSA(rank=2))
    perturb(adapter)
    for call in (adapter.unmerge, adapter.unfold):
        with pytest.raises(RuntimeError, match="adapter 'default' is attached; this needs it to be"):
            call()
    adapter.merge()
    for call in (adapter.merge, adapter.fold, adapter.unfold):
        with pytest.raises(RuntimeError, match="is merged; this needs it to be"):
            call()
    adapter.unmerge()
    adapter.fold()
    for call in (adapter.fold, adapter.unmerge):
        with pytest.raises(RuntimeError, match="is folded"):
            call()
    adapter.unfold()
    out = net(x)
    with adapter.disabled():
        for call in (adapter.fold, adapter.unmerge, adapter.unfold):
            with pytest.raises(RuntimeError, match="is disabled"):
                call()
    assert torch.equal(net(x), out)
    adapter.detach()
    for call in (
        adapter.merge,
        adapter.fold,
        adapter.unmerge,
        adapter.unfold,
        adapter.detach,
        adapter.disabled().__enter__,
    ):
        with pytest.raises(RuntimeError, match="is detached"):
            call()


def test_gradient_mode_without_before_step(net: Net):
    adapter = attach(net, SORSA(rank=2, mode="gradient"))
    with pytest.raises(RuntimeError, match=r"call adapter.before_step\(peak_lr\) before the step"):
        adapter.after_step()
    adapter.before_step(1e-3)
    adapter.after_step()
    with pytest.raises(RuntimeError, match="before_step"):
        adapter.after_step()


def test_an_rwkv_that_rescales_its_weights_is_refused():
    from transformers import RwkvConfig, RwkvModel

    config = RwkvConfig(vocab_size=20, hidden_size=8, num_hidden_layers=3, rescale_every=2)
    model = RwkvModel(config)
    with refused(model, "rescale_every=2", "model.config.rescale_every = 0"):
        attach(model, LoRA(rank=2), targets="rwkv")
    model.config.rescale_every = 0
    assert len(attach(model, LoRA(rank=2), targets="rwkv").sites) == 3 * 7


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: svdpeft.LoRA(alpha=math.nan), "alpha nan is not a finite number"),
        (lambda: svdpeft.SORSA(gamma=math.inf), "gamma inf is not a finite number"),
        (lambda: svdpeft.TinyLoRA(u=2.5), "u 2.5 is not a whole number"),
        (lambda: svdpeft.OFT(block_size=4.0), "block_size 4.0 is not a whole number"),
        (lambda: svdpeft.Budget(target_rank=math.nan), "target_rank nan is not a finite number"),
        (lambda: svdpeft.SORSA(gamma="adaptive"), "neither a number, a Schedule nor an Adaptive"),
        (lambda: svdpeft.AdaLoRA(allocate=True), "neither a Budget nor a mapping"),
        (lambda: svdpeft.DoRA({"name": "lora", "rnak": 2}), "did you mean 'rank'"),
    ],
)
def test_numbers_that_are_none_and_parts_that_are_none_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("method", [svdpeft.OFT(block_size=2), svdpeft.BOFT(block_size=2), svdpeft.FLoRA()])
def test_a_weight_of_zeros_cannot_be_turned_or_scaled(method):
    model = nn.Sequential(nn.Linear(4, 3))
    nn.init.zeros_(model[0].weight)
    with refused(model, "0 (3x4) is all zero"):
        svdpeft.attach(model, method, ["0"])


def test_names_are_found_whatever_their_case():
    with pytest.raises(ValueError, match="did you mean 'sorsa'"):
        svdpeft.method("SORSA")
