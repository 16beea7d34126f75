"""The table of docs/from-peft.md, "Every name": each row does there what its counterpart does here."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_optimizers
import torch
from torch import Tensor, nn

import svdpeft
from svdpeft import DoRA, LoRA, PiSSA

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own
PAGE = Path(__file__).parents[2] / "docs" / "from-peft.md"
ROWS: dict[str, Callable[..., None]] = {}
IDS = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(1))


def row(*cells: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark what shows these rows, by the beginnings of their left cells."""

    def register(test: Callable[..., None]) -> Callable[..., None]:
        ROWS.update(dict.fromkeys(cells, test))
        return test

    return register


def table() -> list[str]:
    section = PAGE.read_text().split("## Every name")[1]
    return [line.split(" | ")[0].removeprefix("| ") for line in section.splitlines() if line.startswith("| `")]


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=40, attention_bias=True, **sizes, **options)
    return transformers.LlamaForCausalLM(config).eval()


def logits(model: nn.Module, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def moved(adapter: Any, seed: int = 0) -> Any:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return adapter


def there(config: Any, model: Any = None) -> Any:
    return peft.get_peft_model(llama() if model is None else model, config)


def adapted(theirs: Any) -> set[str]:
    prefix = "base_model.model."
    return {n.removeprefix(prefix) for n, m in theirs.named_modules() if hasattr(m, "lora_A") and n.startswith(prefix)}


def scaling(theirs: Any) -> dict[str, float]:
    named = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules()}
    return {name: named[name].scaling["default"] for name in adapted(theirs)}


def trains(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.fixture
def two(tmp_path: Path) -> SimpleNamespace:
    """The same two adapters, ours and PEFT's, on equal bases."""
    ours, theirs = llama(), None
    for seed, (name, method) in enumerate((("a", LoRA(rank=2, alpha=4)), ("b", PiSSA(rank=3)))):
        moved(svdpeft.attach(ours, method, ["q_proj", "v_proj"], name=name), seed)
        svdpeft.export_lora(svdpeft.adapters(ours)[name], tmp_path / name)
        if theirs is None:
            theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path / name), adapter_name=name)
        else:
            theirs.load_adapter(str(tmp_path / name), adapter_name=name)
    return SimpleNamespace(ours=ours, theirs=theirs, folder=tmp_path, **svdpeft.adapters(ours))


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@row("`trainable_token_indices=", "`model.save_pretrained(path, save_embedding_layers=")
@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens(tied: bool, tmp_path: Path):
    """A few steps of SGD on equal bases with equal new rows: the same rows, the same logits, here from the old base."""
    ours, theirs = llama(tie_word_embeddings=tied), llama(tie_word_embeddings=tied)
    for model in (ours, theirs):
        torch.manual_seed(3)
        model.resize_token_embeddings(43, mean_resizing=False)
    rows = [5, *range(40, 43)]
    chosen = {"embed_tokens": rows} if tied else {"embed_tokens": rows, "lm_head": rows}
    adapter = svdpeft.attach(ours, LoRA(rank=2), ["q_proj"], train=chosen)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], trainable_token_indices=chosen)
    wrapped = there(config, theirs)
    with torch.no_grad():
        for p in (*adapter.roles()["A"], *(p for name, p in wrapped.named_parameters() if "lora_A" in name)):
            p.fill_(0.1)
    assert adapter.trainable_count == trains(wrapped)
    ids = torch.cat([IDS, torch.tensor([[40, 5, 41, 3, 42, 40, 1]])])
    for model, parameters in ((ours, list(adapter.parameters())), (wrapped, None)):
        parameters = [p for p in model.parameters() if p.requires_grad] if parameters is None else parameters
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        for _ in range(3):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    same(logits(ours, ids), logits(wrapped, ids))
    adapter.save(tmp_path / "ours")
    with adapter.disabled():
        before = logits(ours, ids)
    assert (logits(ours, ids) - before).abs().max() > 1e-2
    old = llama(tie_word_embeddings=tied)
    svdpeft.load(old, tmp_path / "ours")
    same(logits(old, ids), logits(wrapped, ids))


row("`create_loraplus_optimizer")(test_optimizers.test_loraplus)
row("`create_riemannian_optimizer")(test_optimizers.test_riemannian_preconditioning)


def test_every_row_is_shown():
    assert len(table()) > 20
    for cell in table():
        assert any(cell.startswith(known) for known in ROWS), f"no test shows {cell}"
    for known in ROWS:
        assert any(cell.startswith(known) for cell in table()), f"no row begins with {known}"


@pytest.mark.parametrize(
    ("config", "attach"),
    [
        ({"target_modules": ["q_proj"]}, {"targets": ["q_proj"]}),
        ({"target_modules": "all-linear"}, {"targets": "all-linear"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 1]}, {"targets": [r".*layers\.[01]\..*q_proj"]}),
        (
            {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 4}},
            {"method": LoRA(rank={"k_proj": 4, ".*": 8}), "targets": ["q_proj", "k_proj"]},
        ),
        (
            {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 4}, "alpha_pattern": {"k_proj": 2}},
            {"method": None, "targets": {"k_proj": LoRA(rank=4, alpha=2), "q_proj": LoRA(rank=8)}},
        ),
        (
            {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
            {"targets": "all-linear", "exclude": ["k_proj"]},
        ),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"targets": ["q_proj"], "train": ["lm_head"]}),
        ({"target_modules": ["q_proj"], "bias": "lora_only"}, {"targets": ["q_proj"], "bias": True}),
        ({"target_modules": ["q_proj"], "bias": "all"}, {"targets": ["q_proj"], "train": [r".*\.bias"]}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
@row(
    "`get_peft_model(",
    '`target_modules="all-linear"`',
    "`layers_to_transform",
    "`rank_pattern",
    "`exclude_modules",
    "`modules_to_save",
    '`bias="lora_only"`',
    '`bias="all"`',
    "`model.print_trainable_parameters()`",
)
def test_what_is_adapted_and_how_much_trains(config: dict[str, Any], attach: dict[str, Any]):
    theirs = there(peft.LoraConfig(r=8, **config))
    ours = svdpeft.attach(llama(), **{"method": LoRA(rank=8), **attach})
    assert set(ours.sites) == adapted(theirs)
    assert ours.trainable_count == trains(theirs)
    assert f"{ours.trainable_count:,} trainable" in ours.summary()
    scales = scaling(theirs)
    if "alpha_pattern" in config:
        for name, site in ours.sites.items():
            assert site.method.scale == scales[name]


@row("`use_rslora=True`")
def test_variants():
    config = {"r": 4, "target_modules": ["q_proj"]}
    rs = there(peft.LoraConfig(lora_alpha=8, use_rslora=True, **config))
    scale, *_ = scaling(rs).values()
    assert LoRA(rank=4, alpha=8, rs=True).scale == scale
    for options, method in (
        ({"use_dora": True}, DoRA(LoRA(rank=4))),
        ({"init_lora_weights": "pissa", "lora_alpha": 4}, PiSSA(rank=4)),
    ):
        theirs, base = there(peft.LoraConfig(**config, **options)), llama()
        ours = svdpeft.attach(base, method, ["q_proj"])
        assert ours.trainable_count == trains(theirs)
        same(logits(base), logits(theirs))


@row("`target_parameters=")
def test_raw_parameters():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=40, num_local_experts=3, num_key_value_heads=2, **sizes)
    model = transformers.MixtralForCausalLM(config).eval()
    theirs = there(
        peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]), copy.deepcopy(model)
    )
    ours = svdpeft.attach(model, LoRA(rank=2), ["experts.down_proj"])
    assert ours.trainable_count == trains(theirs)


@row("`model.add_adapter(", "`model.set_adapter(", "`model.delete_adapter(", "`with model.disable_adapter():`")
def test_switching(two: SimpleNamespace):
    for name in ("b", "a", "b"):
        two.theirs.set_adapter(name)
        svdpeft.only(two.ours, name)
        same(logits(two.ours), logits(two.theirs))
    with two.theirs.disable_adapter(), svdpeft.only(two.ours):
        assert torch.equal(logits(two.ours), logits(llama()))
        same(logits(two.ours), logits(two.theirs))
    config = peft.LoraConfig(r=8, target_modules=["q_proj"])
    two.theirs.add_adapter("c", config)
    svdpeft.attach(two.ours, LoRA(rank=8), ["q_proj"], name="c")
    for name in ("b", "c"):
        two.theirs.delete_adapter(name)
        svdpeft.adapters(two.ours)[name].detach()
    two.theirs.set_adapter("a")
    svdpeft.only(two.ours, "a")
    same(logits(two.ours), logits(two.theirs))
    assert list(svdpeft.adapters(two.ours)) == list(two.theirs.peft_config) == ["a"]


@row("`model.add_weighted_adapter(")
def test_combining(two: SimpleNamespace):
    two.theirs.add_weighted_adapter(["a", "b"], [0.7, 0.3], "c", combination_type="cat")
    two.theirs.set_adapter("c")
    svdpeft.combine([(two.a, 0.7), (two.b, 0.3)], name="c")
    svdpeft.only(two.ours, "c")
    same(logits(two.ours), logits(two.theirs))
    two.theirs.add_weighted_adapter(["a", "b"], [0.7, 0.3], "d", combination_type="svd", svd_rank=2)
    two.theirs.set_adapter("d")
    svdpeft.combine([(two.a, 0.7), (two.b, 0.3)], rank=2, name="d")
    svdpeft.only(two.ours, "d")
    same(logits(two.ours), logits(two.theirs))


@row("`model(**batch, adapter_names=")
def test_mixed_batches(two: SimpleNamespace):
    theirs = logits(two.theirs.eval(), adapter_names=["a", "b", "__base__"])
    with two.a.per_example(["a", "b", None]):
        same(logits(two.ours), theirs)


@row("`model.merge_and_unload()`", "`model.merge_adapter()`", "`model.unload()`")
def test_merging(two: SimpleNamespace):
    two.theirs.set_adapter("b")
    svdpeft.only(two.ours, "b")
    two.theirs.merge_adapter()
    two.b.merge()
    same(logits(two.ours), logits(two.theirs))
    two.theirs.unmerge_adapter()
    two.b.unmerge()
    same(logits(two.ours), logits(two.theirs))
    two.a.detach()
    merged = two.theirs.merge_and_unload()
    two.b.merge(permanent=True)
    same(logits(two.ours), logits(merged))
    assert two.ours.state_dict().keys() == merged.state_dict().keys() == llama().state_dict().keys()
    unloaded = there(peft.LoraConfig(r=2, target_modules=["q_proj"])).unload()
    model = llama()
    moved(svdpeft.attach(model, LoRA(rank=2), ["q_proj"])).detach()
    assert torch.equal(logits(model), logits(unloaded))


@row("`model.save_pretrained(path)`", "`PeftModel.from_pretrained(", "`model.load_adapter(", "`low_cpu_mem_usage=True`")
def test_files(two: SimpleNamespace):
    two.b.save(two.folder / "saved")
    svdpeft.export_lora(two.b, two.folder / "theirs")
    theirs = peft.PeftModel.from_pretrained(llama(), str(two.folder / "theirs"), low_cpu_mem_usage=True)
    model = llama()
    svdpeft.load(model, two.folder / "saved")
    same(logits(model), logits(theirs))
    imported = llama()
    svdpeft.import_peft(imported, two.folder / "theirs")
    same(logits(imported), logits(theirs))
    theirs.load_adapter(str(two.folder / "a"), "other")  # and goes on with the one that is on
    two.a.save(two.folder / "first")
    svdpeft.load(model, two.folder / "first", name="other", enabled=False)
    same(logits(model), logits(theirs))
    theirs.set_adapter("other")
    svdpeft.only(model, "other")
    same(logits(model), logits(theirs))
    model, state = llama(), torch.get_rng_state()
    svdpeft.load(model, two.folder / "first")
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn


@row("`hotswap_adapter(", "`prepare_model_for_compiled_hotswap(", "`get_peft_model_state_dict(")
def test_hotswap(two: SimpleNamespace):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    theirs = peft.PeftModel.from_pretrained(llama(), str(two.folder / "a"))
    prepare_model_for_compiled_hotswap(theirs, target_rank=8)
    hotswap_adapter(theirs, str(two.folder / "b"), adapter_name="default")
    model = llama()
    slot = svdpeft.attach(model, LoRA(rank=8), ["q_proj", "v_proj"])
    two.b.save(two.folder / "saved")
    for source in (two.folder / "saved", two.b.state_dict()):
        slot.load_state_dict(two.a.state_dict())
        slot.load_state_dict(source)
        same(logits(model), logits(theirs))
    state = peft.get_peft_model_state_dict(theirs)
    assert set(state)
    again = svdpeft.attach(llama(), LoRA(rank=8), ["q_proj", "v_proj"])
    again.load_state_dict(slot.state_dict())
    for name, tensor in slot.state_dict().tensors.items():
        assert torch.equal(again.state_dict().tensors[name], tensor)


def test_the_left_cells_are_calls_of_peft():
    """Every name that the table says PEFT has is one of PEFT's."""
    config = set(peft.LoraConfig.__dataclass_fields__)
    model = there(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for cell in table():
        for name in re.findall(r"`(?:with )?model\.(\w+)", cell):
            assert hasattr(model, name), name
        for name in re.findall(r"(?<![\w.(])(\w+)=", cell.partition("(")[0]):
            assert name in config or name == "low_cpu_mem_usage", name
