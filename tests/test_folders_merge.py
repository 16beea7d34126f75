"""Adapters merged into models on the disk, beside the same done in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folder_models import CASES, contents, gpt2, llama, mixtral, moved, resnet, saved, tensors, vit
from helpers import bits, perturb
from rows import one_each
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import svdpeft
from svdpeft import CheckpointError, HeadOnly, LoRA, PiSSA
from svdpeft.folders import changes, merge, shards
from svdpeft.folders.folder import Entry
from svdpeft.folders.rounding import stochastic


def same_as_in_memory(base: Path, adapter: Any, tmp_path: Path, **model_args: Any) -> None:
    """Merge on the disk and in memory: the same files with the same bits, and the same report."""
    before = contents(base)
    adapter.save(tmp_path / "adapter")
    report = merge(base, tmp_path / "adapter", tmp_path / "out")
    assert contents(base) == before
    expected = adapter.merge(permanent=True)
    saved(adapter.model, tmp_path / "memory", **model_args)
    found = contents(tmp_path / "out")
    assert found == contents(tmp_path / "memory")
    changed = {name for name in found if found[name] != before[name]}
    assert changed, "nothing has changed"
    parts = {name.partition("[")[0] for name in expected.lost}
    assert report.lost.keys() == expected.lost.keys()
    if len(parts) == len(expected.lost):  # in memory a part's share is of its own update
        assert report.lost == expected.lost
    assert 0 <= report.worst < 1


@one_each
def test_every_method_merges_as_in_memory(method: Any, tmp_path: Path):
    model = llama()
    base = saved(model, tmp_path / "base")
    assert len(list(base.glob("*.safetensors"))) > 2
    same_as_in_memory(base, moved(model, method, targets=["q_proj", "down_proj"]), tmp_path)
    assert {file.name for file in base.iterdir()} == {file.name for file in (tmp_path / "out").iterdir()}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(bits(a) == bits(b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_weight_merges_as_in_memory(case: str, tmp_path: Path):
    build, options = CASES[case]
    model = build()
    base = saved(model, tmp_path / "base")
    options = {"clip_rank": True, **options}
    adapter = svdpeft.attach(model, PiSSA(rank=2), **options)
    perturb(adapter)
    same_as_in_memory(base, adapter, tmp_path)


@pytest.mark.parametrize("targets", [["qkv[q]", "qkv[v]", "fc1"], "all"], ids=str)
def test_a_transformer_of_timm_merges_as_in_memory(targets: Any, tmp_path: Path):
    model, sizes = vit()
    base = saved(model, tmp_path / "base", **sizes)
    adapter = svdpeft.attach(model, LoRA(rank=2), targets, train=["head"])
    perturb(adapter)
    same_as_in_memory(base, adapter, tmp_path, **sizes)
    again = svdpeft.models.load(str(tmp_path / "out")).model
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(x), model(x))


def test_convolutions_and_running_statistics_merge_as_in_memory(tmp_path: Path):
    model, sizes = resnet()
    base = saved(model, tmp_path / "base", **sizes)
    adapter = svdpeft.attach(model, PiSSA(rank=1), "all", clip_rank=True)
    perturb(adapter, 0.01)
    model.train()(torch.randn(2, 3, 32, 32))
    model.eval()
    same_as_in_memory(base, adapter, tmp_path, **sizes)
    before, after = tensors(base), tensors(tmp_path / "out")
    assert int(after["bn1.num_batches_tracked"]) == int(before["bn1.num_batches_tracked"]) + 1
    assert not torch.equal(after["bn1.running_mean"], before["bn1.running_mean"])


@pytest.mark.parametrize("block", [changes.BLOCK, 50], ids=["whole", "three rows at a time"])
def test_the_sum_of_several_is_rounded_once(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(changes, "BLOCK", block)
    base = saved(llama(torch.float64), tmp_path / "base")
    adapters = []
    for i, name in enumerate(("a", "bb")):
        model = llama(torch.float64)
        adapter = svdpeft.attach(model, LoRA(rank=2), [["q_proj"], ["q_proj", "up_proj"]][i], train=["norm"], name=name)
        perturb(adapter, seed=i)
        adapter.save(tmp_path / name)
        adapters.append(adapter)
    merge(base, [(tmp_path / "a", 0.7), (tmp_path / "bb", -0.3)], tmp_path / "out")
    a, b = adapters
    before, after = tensors(base), tensors(tmp_path / "out")
    q, up, norm = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.norm.weight"
    exact = {
        f"{q}.weight": before[f"{q}.weight"] + 0.7 * a.delta(q) - 0.3 * b.delta(q),
        f"{up}.weight": before[f"{up}.weight"] - 0.3 * b.delta(up),
        norm: before[norm] + 0.7 * (a.own[norm] - before[norm]) - 0.3 * (b.own[norm] - before[norm]),
    }
    for name, w in after.items():
        torch.testing.assert_close(w, exact.get(name, before[name]), rtol=1e-13, atol=1e-14)
        assert torch.equal(w, before[name]) == (name not in exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_is_rounded_to_once_and_named(dtype: torch.dtype, tmp_path: Path):
    model = llama(torch.float32)
    base = saved(model, tmp_path / "base")
    adapter = moved(model, LoRA(rank=2), targets=["q_proj"], train=["norm"])
    adapter.save(tmp_path / "adapter")
    report = merge(base, tmp_path / "adapter", tmp_path / "out", dtype=dtype)
    assert (report.worst > 1e-4) == (dtype.itemsize == 2)
    adapter.merge(permanent=True)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == dtype
    for found, expected in zip(again.parameters(), model.parameters(), strict=True):
        assert bits(found) == bits(expected.to(dtype))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    size = sum(t.nbytes for t in tensors(tmp_path / "out").values())
    assert index["metadata"]["total_size"] == size


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float16, s) for s in (1.0, 300.0, 1e-6)] + [(torch.bfloat16, s) for s in (1.0, 300.0, 1e-39)],
    ids=str,
)
def test_stochastic_rounding_is_right_on_average(dtype: torch.dtype, scale: float):
    """Each value is one of its two neighbours, and over n draws the mean is within five standard errors."""
    x = torch.randn(60, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, torch.zeros(2), torch.tensor([float("inf"), -float("inf")])]) * scale
    n = 4000
    made = stochastic(x.expand(n, -1), dtype, torch.Generator().manual_seed(1)).double()
    finite = x.isfinite()
    assert torch.equal(made[:, ~finite], x[~finite].double().expand(n, -1))
    made, x = made[:, finite], x[finite].double()
    nearest = x.to(dtype)
    other = [made.min(0).values, made.max(0).values]
    assert ((nearest.double() == other[0]) | (nearest.double() == other[1])).all()
    assert (other[0] <= x).all()
    assert (other[1] >= x).all()
    distance = other[1] - other[0]
    neighbours = torch.nextafter(other[0].to(dtype), torch.tensor(float("inf"), dtype=dtype)).double()
    same = distance == 0  # the value itself, or one so near it that no draw went to the other
    off = (made.mean(0) - x).abs()
    assert (off <= 5 * distance / (2 * n**0.5) + same * (nearest.double() - x).abs()).all()
    assert (same | (other[1] == neighbours)).all()
    assert (~same).sum() > 30
    kept = nearest.float()
    assert torch.equal(stochastic(kept, dtype, torch.Generator().manual_seed(2)), kept.to(dtype))


def test_stochastic_rounding_keeps_small_updates_and_is_seeded(tmp_path: Path):
    model = llama()
    base = saved(model, tmp_path / "base")
    adapter = moved(model, LoRA(rank=2), targets=["q_proj"], size=0.004)
    adapter.save(tmp_path / "adapter")
    name = "model.layers.0.self_attn.q_proj"
    exact = model.state_dict()[f"{name}.weight"].float() + adapter.delta(name)
    found = []
    for seed in range(40):
        merge(base, tmp_path / "adapter", tmp_path / f"out{seed}", stochastic_rounding=True, seed=seed)
        found.append(tensors(tmp_path / f"out{seed}")[f"{name}.weight"].float())
    merge(base, tmp_path / "adapter", tmp_path / "again", stochastic_rounding=True, seed=3)
    assert contents(tmp_path / "again") == contents(tmp_path / "out3") != contents(tmp_path / "out4")
    merge(base, tmp_path / "adapter", tmp_path / "nearest")
    nearest = tensors(tmp_path / "nearest")[f"{name}.weight"].float()
    assert (torch.stack(found).mean(0) - exact).norm() < 0.4 * (nearest - exact).norm()
    before = contents(base)
    assert all(contents(tmp_path / "out0")[n] == before[n] for n in before if "q_proj" not in n), "only what is merged"


def test_files_of_another_size(tmp_path: Path):
    model = llama()
    base = saved(model, tmp_path / "base")
    moved(model, LoRA(rank=2), targets=["q_proj"]).save(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "small", shard_size="2000")
    merge(base, tmp_path / "adapter", tmp_path / "one", shard_size="1GB")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > len(list(base.glob("*.safetensors")))
    assert [file.name for file in (tmp_path / "one").glob("*safetensors*")] == ["model.safetensors"]
    for name, (_, *what) in contents(tmp_path / "small").items():
        assert contents(tmp_path / "one")[name][1:] == tuple(what)
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
def test_new_tokens(tied: bool, tmp_path: Path):
    base = saved(llama(tie_word_embeddings=tied), tmp_path / "base")
    model = llama(tie_word_embeddings=tied)
    model.resize_token_embeddings(43, mean_resizing=False)
    rows, ends = range(40, 43), ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    adapter = svdpeft.attach(model, LoRA(rank=2), ["q_proj"], train=dict.fromkeys(ends, rows))
    perturb(adapter)
    adapter.save(tmp_path / "adapter")
    other = moved(llama(tie_word_embeddings=tied), LoRA(rank=1), targets=["k_proj"])
    other.save(tmp_path / "other")
    merge(base, [tmp_path / "other", tmp_path / "adapter"], tmp_path / "out")
    svdpeft.load(model, tmp_path / "other", name="other").merge(permanent=True)
    adapter.merge(permanent=True)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.vocab_size == 43
    for name, t in again.state_dict().items():
        assert bits(t) == bits(model.state_dict()[name]), name


def test_all_other_files_are_copied_and_no_other_weights(tmp_path: Path):
    model = llama()
    base = saved(model, tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    (base / "original").mkdir()
    (base / "original" / "params.json").write_text("1")
    for name in ("pytorch_model.bin", "original/consolidated.00.pth", ".gitattributes", "pytorch_model.bin.index.json"):
        (base / name).write_text("old")
    moved(model, LoRA(rank=2), targets=["q_proj"]).save(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out" / "original" / "params.json").read_text() == "1"
    names = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    weights = {file.name for file in base.glob("model*")}
    assert names == weights | {"config.json", "generation_config.json", "tokenizer.json", "original/params.json"}


def test_the_random_state_is_left(tmp_path: Path):
    model = llama()
    base = saved(model, tmp_path / "base")
    moved(model, LoRA(rank=2), targets=["q_proj"]).save(tmp_path / "adapter")
    state = torch.get_rng_state()
    merge(base, tmp_path / "adapter", tmp_path / "out", stochastic_rounding=True)
    assert torch.equal(torch.get_rng_state(), state)


# -- what is refused ------------------------------------------------------------------------------------------------


def refuses(tmp_path: Path, *words: str, error: type[Exception] = ValueError, **options: Any) -> None:
    there = sorted(tmp_path.rglob("*"))
    given = {"base": tmp_path / "base", "adapters": tmp_path / "adapter", "out": tmp_path / "out", **options}
    with pytest.raises(error) as caught:
        merge(**given)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert sorted(tmp_path.rglob("*")) == there, "something is left of a merge that was refused"


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    model = llama()
    saved(model, tmp_path / "base")
    moved(model, LoRA(rank=2), targets=["q_proj"]).save(tmp_path / "adapter")
    return tmp_path


def test_another_base(ready: Path):
    other = llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    saved(other, ready / "other")
    refuses(ready, "another base", "q_proj", "check_base=False", error=CheckpointError, base=ready / "other")
    merge(ready / "other", ready / "adapter", ready / "out", check_base=False)
    saved(llama(torch.float32), ready / "wide")
    with pytest.warns(UserWarning, match=r"was made for a base in torch\.bfloat16.*float32 here"):
        merge(ready / "wide", ready / "adapter", ready / "out2")


def test_another_model(ready: Path):
    saved(gpt2(), ready / "other")
    refuses(ready, "which this model does not have", error=CheckpointError, base=ready / "other")
    saved(llama(hidden_size=8), ready / "narrow")
    refuses(ready, "made for another base", error=CheckpointError, base=ready / "narrow", check_base=False)


def test_a_tied_weight_of_which_one_use_is_adapted(tmp_path: Path):
    model = llama(tie_word_embeddings=True)
    saved(model, tmp_path / "base")
    moved(model, LoRA(rank=2), targets=["lm_head"]).save(tmp_path / "adapter")
    refuses(tmp_path, "lm_head cannot be merged", "embed_tokens", "untie=True")


def test_a_checkpoint_with_other_names(tmp_path: Path):
    model = mixtral()
    saved(model, tmp_path / "base")
    moved(model, LoRA(rank=2), targets=["q_proj", "down_proj"]).save(tmp_path / "adapter")
    refuses(tmp_path, "experts.down_proj", "under another name", "adapter.merge(permanent=True)")


def test_one_adapts_and_another_trains_whole(ready: Path):
    svdpeft.attach(llama(torch.float32), HeadOnly(), train=["q_proj"]).save(ready / "whole")
    refuses(ready, "q_proj", "trains it whole", adapters=[ready / "adapter", ready / "whole"])


BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no adapter": ({"adapters": []}, ("at least one adapter",)),
    "no adapter there": ({"adapters": "nowhere"}, ("nowhere is not an adapter folder",)),
    "a weight": ({"adapters": [("adapter", float("nan"))]}, ("weight nan", "not finite")),
    "a dtype": ({"dtype": torch.int8}, ("torch.int8", "torch.bfloat16")),
    "no model": ({"base": "nowhere"}, ("nowhere does not exist",)),
    "an adapter as a model": ({"base": "adapter"}, ("no config.json",)),
    "a size": ({"shard_size": "2 parsecs"}, ("CS",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(case: str, ready: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ready)
    options, words = BAD[case]
    refuses(ready, *words, **options)


def test_what_is_there_is_not_overwritten(ready: Path):
    (ready / "out").mkdir()
    (ready / "out" / "mine.txt").write_text("mine")
    refuses(ready, "out exists", error=FileExistsError)
    refuses(ready, "base exists", error=FileExistsError, out=ready / "base")


def test_damaged_models_are_told(ready: Path):
    shard = sorted((ready / "base").glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    refuses(ready, shard.name, "damaged or cut off")
    shard.unlink()
    refuses(ready, shard.name, "missing")
    shard.write_bytes(whole)
    index = ready / "base" / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text[:50])
    refuses(ready, index.name, "is damaged")
    index.write_text(text.replace('"lm_head.weight"', '"lm_head.other"'))
    refuses(ready, "no file has lm_head.other")
    index.write_text(text)
    config = ready / "base" / "config.json"
    for old, new, words in (
        ('"LlamaForCausalLM"', '"MyModel"', "class MyModel"),
        ('"architectures"', '"others"', "no 'architectures'"),
    ):
        text = config.read_text()
        config.write_text(text.replace(old, new))
        refuses(ready, words)
        config.write_text(text)
    index.unlink()
    refuses(ready, "neither model.safetensors nor", "save_pretrained")


def test_a_quantised_weight(ready: Path):
    file = next(f for f in (ready / "base").glob("*.safetensors") if any("q_proj" in n for n in load_file(f)))
    found = load_file(file)
    found = {n: t.to(torch.float8_e4m3fn) if "q_proj" in n else t for n, t in found.items()}
    save_file(found, file, metadata={"format": "pt"})
    refuses(ready, "q_proj.weight as F8_E4M3", "quantised")


def test_values_that_would_overflow(tmp_path: Path):
    model = llama(torch.float32)
    saved(model, tmp_path / "base")
    adapter = svdpeft.attach(model, LoRA(rank=1), ["q_proj"])
    with torch.no_grad():
        adapter.sites["model.layers.0.self_attn.q_proj"].factors.L.fill_(1e6)
    adapter.save(tmp_path / "adapter")
    refuses(tmp_path, "q_proj", "overflows torch.float16", dtype=torch.float16)


def test_timm_reads_one_file(tmp_path: Path):
    model, sizes = vit()
    saved(model, tmp_path / "base", **sizes)
    svdpeft.attach(model, LoRA(rank=1), ["fc1"]).save(tmp_path / "adapter")
    refuses(tmp_path, "shard_size", "timm", shard_size="1MB")


def test_the_files_are_as_safetensors_writes_them(tmp_path: Path):
    made = {
        "scalar": torch.tensor(3.0).double(),
        "half": torch.randn(3, 5).half(),
        "flags": torch.tensor([True, False, True]),
        "wide": torch.randn(2, 3).double().mT,
        "other": torch.randn(2, 3).double(),
    }
    written(made, tmp_path)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    empty = {"a": torch.zeros(0, 4), "z": torch.ones(2)}
    written(empty, tmp_path)
    found = load_file(tmp_path / "ours")
    assert all(torch.equal(found[name], t) for name, t in empty.items())


def written(made: dict[str, Tensor], path: Path) -> None:
    save_file({name: t.contiguous() for name, t in made.items()}, path / "theirs", metadata={"format": "pt"})
    with safe_open(path / "theirs", "pt") as opened:
        words = {name: opened.get_slice(name).get_dtype() for name in made}
    entries = {name: Entry("ours", words[name], tuple(t.shape), t.nbytes) for name, t in made.items()}
    parts = {name: t.split(2) if t.ndim else [t] for name, t in made.items()}
    shards.write(path / "ours", entries, parts.__getitem__, {"format": "pt"})
