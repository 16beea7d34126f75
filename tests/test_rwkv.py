"""RWKV-4, 6 and 7 end to end, on small models that were really trained: files, adapters on every matrix, training."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import subprocess
import sys
import traceback
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LIGHT, adapt, close, equal_bits, perturb
from rows import EVERYTHING, covering, label, methods, some, variants
from rwkv_models import FILES, ROOT, Fla7, Plain7, every_version, expected, file, logits, loss, model, state, tokens
from torch import Tensor, nn

from svdpeft import SORSA, SVFT, LoRA, PiSSA, attach
from svdpeft.models import load as load_model
from svdpeft.models import rwkv, rwkv_layout

FACTORED = methods(factored=True)
LAYERS = 2  # of 12 in RWKV-6 and 7, where a test goes over many methods or steps: their recurrence is a loop in Python


def assert_same_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """The same names in the same order, and the same bits, shape and dtype under each."""
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert equal_bits(found[name], value), name


# -- a: the implementations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "tolerance"), [(4, 1e-5), (6, 0.1), (7, 1e-5)])  # 6 was stored with 5 bits
def test_prompt_gives_the_expected_logits(version: int, tolerance: float):
    out = logits(model(version, torch.float32), torch.tensor([list(b'"in')]))[0, -1]
    assert (out - expected(version)).abs().max() < tolerance
    assert int(out.argmax()) == int(expected(version).argmax())


@pytest.mark.parametrize("spelling", [Plain7, Fla7])
def test_equations_under_both_names_give_the_logits_of_the_package(spelling: type[nn.Module]):
    close(logits(spell(spelling), tokens(24)), logits(model(7), tokens(24)))


def spell(spelling: type[nn.Module]) -> nn.Module:
    """A model of ours with the weights of the RWKV-7 file."""
    found = spelling(rwkv.describe(state(7)), state(7)["blocks.0.att.w1"].shape[1]).double()
    rwkv.load_state(found, state(7))
    return found


# -- b: files --------------------------------------------------------------------------------------------------------


@every_version
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_file_goes_through_a_model_bit_for_bit(version: int, dtype: torch.dtype, suffix: str, tmp_path: Path):
    original = {name: value.to(dtype) for name, value in state(version).items()}
    torch.save(original, tmp_path / "old.pth")
    rwkv.write(rwkv.build(tmp_path / "old.pth"), tmp_path / f"new{suffix}")
    again = rwkv.read(tmp_path / f"new{suffix}")
    assert_same_tensors({name: again[name] for name in original}, original)
    assert (list(again) == list(original)) == (suffix == ".pth" or sorted(original) == list(original))
    assert again.keys() == original.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"old.pth", f"new{suffix}"})


@every_version
def test_shapes_without_a_file_are_the_official_ones(version: int):
    found = model(version, torch.float32)
    delattr(found, rwkv_layout.KEPT)
    back = rwkv.official_state(found)
    assert_same_tensors({name: back[name] for name in state(version)}, state(version))


@every_version
def test_load_state_keeps_dtype_and_adapter(version: int):
    found = model(version)
    adapter = attach(found, LoRA(rank=2), targets="rwkv", clip_rank=True)
    perturb(adapter, 0.01)
    adapted = logits(found, tokens(6))
    other = {name: value + value.abs().mean() / 10 for name, value in state(version).items()}
    rwkv.load_state(found, other)
    assert_same_tensors(rwkv.official_state(found, torch.float32), other)
    assert next(iter(rwkv.official_state(found).values())).dtype == torch.float64
    assert (logits(found, tokens(6)) - adapted).abs().max() > 1e-3
    rwkv.load_state(found, state(version))
    assert torch.equal(logits(found, tokens(6)), adapted)


def test_tensors_that_the_model_has_no_place_for_are_kept():
    """Files from the official training code have v0, v1 and v2 in the first layer, which never uses them."""
    unused = {f"blocks.0.att.v{i}": torch.randn(2, 3) for i in range(3)}
    found = rwkv.build(dict(state(7)) | unused)
    assert_same_tensors(rwkv.official_state(found), dict(state(7)) | unused)


def test_wider_low_rank_matrices_of_large_models():
    """rwkv-simple has the small models' widths as constants; zeros beyond them change nothing."""
    wider = dict(state(6))
    for i in range(12):
        at = f"blocks.{i}.att.time_decay_w"
        wider[f"{at}1"] = torch.cat([wider[f"{at}1"], torch.zeros(128, 5)], dim=1)
        wider[f"{at}2"] = torch.cat([wider[f"{at}2"], torch.ones(5, 128)])
    close(logits(rwkv.build(wider).double(), tokens(6)), logits(model(6), tokens(6)))


@every_version
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_model_is_written_and_built_again(version: int, suffix: str, dtype: torch.dtype, tmp_path: Path):
    found = model(version, dtype)
    base = logits(found, tokens(8))
    adapter = attach(found, SORSA(rank=4), targets="rwkv")
    perturb(adapter, 0.02)
    adapter.merge()
    merged = logits(found, tokens(8))
    assert (merged - base).abs().max() > 1e-3
    rwkv.write(found, tmp_path / f"merged{suffix}")
    loaded = load_model(str(tmp_path / f"merged{suffix}"), dtype=dtype)
    assert (loaded.modality, loaded.head) == ("language", None)
    assert loaded.processor(["so"]).input_ids == [[115, 111]]
    assert not loaded.model.training
    assert torch.equal(logits(loaded.model, tokens(8)), merged)
    adapter.unmerge()
    with adapter.disabled():
        rwkv.write(found, tmp_path / "base.pth")
    assert_same_tensors(rwkv.read(tmp_path / "base.pth"), {k: v.to(dtype) for k, v in state(version).items()})


def test_dtype_of_the_file_can_be_chosen(tmp_path: Path):
    rwkv.write(model(7), tmp_path / "half.pth", dtype=torch.bfloat16)
    half = rwkv.read(tmp_path / "half.pth")
    assert_same_tensors(half, {name: value.bfloat16() for name, value in state(7).items()})
    assert rwkv.build(half).lm_head.weight.dtype == torch.bfloat16
    assert load_model(str(tmp_path / "half.pth")).model.lm_head.weight.dtype == torch.float32


def test_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, found = tmp_path / "a.pth", model(4)
    rwkv.write(found, path)
    before = path.read_bytes()

    def crash(_state: Any, new: Path) -> None:
        new.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        rwkv.write(found, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


SIZES = {"version": (4, 6, 7), "layers": (4, 12, 12), "width": (128, 128, 64), "ffn": (256, 448, 256)}


@pytest.mark.parametrize("position", range(3))
def test_description(position: int):
    found = rwkv.describe(state(SIZES["version"][position]))._asdict()
    assert {name: found[name] for name in SIZES} == {name: values[position] for name, values in SIZES.items()}
    assert (found["vocab"], found["heads"], found["head_size"]) == (256, *((None, None), (16, 8), (1, 64))[position])


FIVE = {  # names of RWKV-5.2
    "emb.weight": torch.ones(9, 4),
    "blocks.0.att.key.weight": torch.ones(4, 4),
    "blocks.0.ffn.key.weight": torch.ones(8, 4),
    "blocks.0.att.time_faaaa": torch.ones(2, 2),
    "blocks.0.att.time_mix_g": torch.ones(1, 1, 4),
    "blocks.0.att.ln_x.weight": torch.ones(4),
}


def test_version_5_is_known_but_not_built():
    assert rwkv.describe(FIVE) == rwkv.Shape(5, 1, 4, 8, 9, 2, 2)
    early = {name.replace("time_faaaa", "time_first"): value for name, value in FIVE.items()}
    assert rwkv.describe(early | {"blocks.0.att.time_first": torch.ones(2)}) == rwkv.Shape(5, 1, 4, 8, 9, 2, 2)
    with pytest.raises(ValueError, match="RWKV-5 is known, only of versions 4, 6, 7"):
        rwkv.build(FIVE)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "it lacks any of blocks.0.att.r_k"),
        ({"model.embed_tokens.weight": torch.ones(2, 2)}, "model.embed_tokens.weight"),
        ({"blocks.0.att.r_k": torch.ones(1, 4)}, "it lacks emb.weight"),
        ({"emb.weight": torch.ones(9, 4), "blocks.0.att.time_aaa_w1": torch.ones(4, 4)}, "preview of RWKV-7"),
        ({k: v for k, v in FIVE.items() if "key" not in k}, "lacks blocks.0.ffn.key.weight"),
        ({"emb.weight": [1.0]}, "not a mapping from names to tensors"),
        ([torch.ones(3)], "not a mapping from names to tensors"),
        (functools.partial(len), "holds more than tensors"),
    ],
    ids=range(8),
)
def test_other_files_are_refused(content: Any, words: str, tmp_path: Path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        rwkv.read(tmp_path / "a.pth")
    assert "a.pth" in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_refused(suffix: str, tmp_path: Path):
    path = tmp_path / f"a{suffix}"
    rwkv.write(model(4), path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:3], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            rwkv.read(path)
    with pytest.raises(FileNotFoundError):
        load_model(str(tmp_path / f"missing{suffix}"))


def test_old_torch_format_is_read(tmp_path: Path):
    """Files from before torch 1.6 are no zip archives, so that they cannot be mapped."""
    torch.save(dict(state(4)), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same_tensors(rwkv.read(tmp_path / "old.pth"), state(4))


def test_other_suffixes_are_refused(tmp_path: Path):
    for use in (rwkv.read, functools.partial(rwkv.write, nn.Linear(2, 2))):
        with pytest.raises(ValueError, match=r"a\.gguf .*\.pth, \.pt, \.safetensors"):
            use(tmp_path / "a.gguf")


@every_version
def test_tensors_that_do_not_fit_are_refused_and_change_nothing(version: int):
    found = model(version, torch.float32)
    key = "blocks.1.att.key.weight"
    for change, words in (
        ({key: None}, f"the checkpoint has no {key}"),
        ({"blocks.1.att.keys.weight": state(version)[key]}, "has no blocks.1.att.keys.weight: did you mean"),
        ({key: state(version)[key][:-1]}, f"{key} is .* in the checkpoint"),
    ):
        wrong = {name: value + 1 for name, value in state(version).items()} | change
        wrong = {name: value for name, value in wrong.items() if value is not None}
        with pytest.raises(ValueError, match=words):
            rwkv.load_state(found, wrong)
        with pytest.raises(ValueError, match=r"blocks\.1\.att\.key"):
            rwkv.build(wrong)
    assert_same_tensors(rwkv.official_state(found), state(version))


@pytest.mark.parametrize(("version", "name"), [(6, "time_maa_w1"), (7, "g1")])
def test_low_rank_matrix_missing_from_a_file(version: int, name: str):
    with pytest.raises(ValueError, match=f"no complete RWKV-{version} checkpoint: no blocks.0.att.{name}"):
        rwkv.build({key: value for key, value in state(version).items() if not key.endswith(f"0.att.{name}")})


def test_adapters_that_a_file_would_misrepresent_are_refused(tmp_path: Path):
    found = model(4)
    adapter = attach(found, PiSSA(rank=2), targets="rwkv", name="mine")
    with pytest.raises(ValueError, match=r"'mine' is attached: its update .* merge\(\) first"):
        rwkv.write(found, tmp_path / "a.pth")
    assert_same_tensors(rwkv.official_state(found, torch.float32), state(4))
    adapter.fold()
    for use in (rwkv.official_state, lambda m: rwkv.write(m, tmp_path / "a.pth"), lambda m: rwkv.load_state(m, {})):
        with pytest.raises(ValueError, match=r"'mine' is folded: .* unfold\(\) first"):
            use(found)
    adapter.unfold()
    adapter.merge()
    with pytest.raises(ValueError, match=r"'mine' is merged: .* unmerge\(\) first"):
        rwkv.load_state(found, state(4))
    assert not list(tmp_path.iterdir())


def test_weights_that_transformers_has_divided_are_refused():
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(vocab_size=9, hidden_size=4, num_hidden_layers=3, rescale_every=2)
    found = RwkvForCausalLM(config).eval()
    before = rwkv.official_state(found)
    found(torch.tensor([[1, 2]]))  # divides the weights of the third layer
    for use in (rwkv.official_state, lambda m: rwkv.load_state(m, before)):
        with pytest.raises(ValueError, match="rescale_every=2"):
            use(found)
    built = rwkv.build(before)
    kept = rwkv.official_state(built)
    built(torch.tensor([[1, 2]]))
    assert_same_tensors(rwkv.official_state(built.train()), kept)


@pytest.mark.parametrize(("version", "package"), [(6, "rwkv-simple"), (7, "rwkv7-hf")])
def test_missing_package_is_named(version: int, package: str, monkeypatch: pytest.MonkeyPatch):
    file(version)
    for name in ("rwkv_simple", "rwkv_simple.rwkv", "rwkv7_hf", "rwkv7_hf.converter"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        rwkv.build(state(version))
    assert "TORCHDYNAMO_DISABLE" not in os.environ


def test_kernel_of_rwkv_simple_is_not_compiled(monkeypatch: pytest.MonkeyPatch):
    """It is imported with torch.compile switched off; afterwards the variable is what it was."""
    file(6)
    for name in [name for name in sys.modules if name.partition(".")[0] == "rwkv_simple"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    rwkv.build(state(6))
    assert os.environ["TORCHDYNAMO_DISABLE"] == "0"
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    assert hasattr(compiled, "_torchdynamo_orig_callable")
    assert not hasattr(sys.modules["rwkv_simple.rwkv"].wkv6_torch, "_torchdynamo_orig_callable")


# -- c: one sequence, three ways to give it --------------------------------------------------------------------------


@every_version
def test_whole_chunked_and_one_by_one_are_the_same(version: int):
    found, ids = model(version, layers=None if EVERYTHING else LAYERS), tokens(19)
    outputs = []
    adapter = None
    for stage in ("base", "adapted", "merged"):
        if stage == "adapted":
            adapter = attach(found, SORSA(rank=4), targets="rwkv")
            perturb(adapter, 0.02)
        elif stage == "merged":
            assert adapter is not None
            adapter.merge()
        whole = logits(found, ids)
        close(logits(found, ids, [7, 1, 8, 3]), whole)
        close(logits(found, ids, 1), whole)
        outputs.append(whole)
    assert (outputs[1] - outputs[0]).abs().max() > 1e-3
    close(outputs[2], outputs[1])


@every_version
def test_rows_of_a_batch_do_not_see_each_other(version: int):
    found, ids = model(version), tokens(12, batch=3)
    perturb(attach(found, LoRA(rank=4), targets="rwkv"), 0.02)
    alone = torch.cat([logits(found, row[None]) for row in ids])
    close(logits(found, ids), alone)
    close(logits(found, ids, 1), alone)  # transformers' RWKV-4 would take rows for positions here


# -- d: every method on every matrix ---------------------------------------------------------------------------------


# Each method in one of its variants on one of the versions, the ones that are its turn; with ``--all`` all on all.
ROWS = sorted(
    (version, FACTORED.index(method))
    for same in variants(factored=True)
    for version, method in some(list(itertools.product((4, 6, 7), same)), "rwkv", same[0].name)
)
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"rwkv{row[0]}-{label(FACTORED[row[1]])}")
READER = (
    f"""
LAYERS = {LAYERS}"""
    + """
import json, pathlib, sys, traceback
import torch
from helpers import equal_bits
from rwkv_models import logits, model, tokens
import svdpeft

torch.set_num_threads(1)
torch.manual_seed(987)
root, wrong, models = pathlib.Path(sys.argv[1]), {}, {}
for name in json.loads((root / "rows.json").read_text()):
    try:
        version = int(name[0])
        found = models.get(version) or models.setdefault(version, model(version, layers=LAYERS))
        adapter = svdpeft.load(found, root / name / "adapter")
        truth = torch.load(root / name / "logits.pt")
        assert equal_bits(logits(found, tokens(4)), truth["adapted"]), "the logits differ"
        adapter.merge()
        assert equal_bits(logits(found, tokens(4)), truth["merged"]), "the merged logits differ"
        adapter.detach()
    except Exception:
        wrong[name] = traceback.format_exc()
        models.pop(int(name[0]), None)
(root / "wrong.json").write_text(json.dumps(wrong))
"""
)


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every row attached, moved, merged, unmerged and saved here, and loaded in one new process: what went wrong."""
    root = tmp_path_factory.mktemp("files")
    wrong: dict[str, str] = {}
    for version in {version for version, _ in ROWS if file(version)}:
        found = model(version, layers=LAYERS)
        base = logits(found, tokens(4))
        for position in (position for its, position in ROWS if its == version):
            folder = root / f"{version}-{position}"
            folder.mkdir()
            try:
                _check_row(found, base, state(version, LAYERS), FACTORED[position], folder)
            except AssertionError:
                wrong[folder.name] = traceback.format_exc()
                found = model(version, layers=LAYERS)
    rows = [f"{version}-{position}" for version, position in ROWS]
    (root / "rows.json").write_text(json.dumps([row for row in rows if row not in wrong]))
    (root / "reader.py").write_text(READER)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (LIGHT, ROOT / "tests", ROOT))),
        "PYTHONHASHSEED": "77",
    }
    subprocess.run([sys.executable, str(root / "reader.py"), str(root)], check=True, env=environment, timeout=1800)
    return wrong | json.loads((root / "wrong.json").read_text())


def _check_row(found: nn.Module, base: Tensor, weights: Mapping[str, Tensor], method: Any, folder: Path) -> None:
    """One method on one model; the model is the base again afterwards."""
    seen = method.needs == "inputs"  # of raw matrices there are none: the rest
    adapter = adapt(found, method, targets="all-linear" if seen else "rwkv")
    exact = all(site.method.exact_start for site in adapter.sites.values())
    assert torch.equal(logits(found, tokens(4)), base) == exact
    perturb(adapter, 0.02)
    adapted = logits(found, tokens(4))
    assert bool(adapted.isfinite().all())
    assert (adapted - base).abs().max() > 1e-5  # AdaLoRA's three small factors make a very small update
    adapter.save(folder / "adapter")
    adapter.merge()
    merged = logits(found, tokens(4))
    close(merged, adapted)
    torch.save({"adapted": adapted, "merged": merged}, folder / "logits.pt")
    adapter.unmerge()
    assert torch.equal(logits(found, tokens(4)), adapted)
    adapter.detach()
    assert_same_tensors(rwkv.official_state(found, torch.float32), weights)
    assert torch.equal(logits(found, tokens(4)), base)


@pytest.mark.xdist_group("rwkv-files")  # one worker writes them for all rows
@every_row
def test_start_merge_unmerge_and_load_in_another_process(loaded_elsewhere: dict[str, str], row: tuple[int, int]):
    name = f"{row[0]}-{row[1]}"
    assert name not in loaded_elsewhere, loaded_elsewhere[name]


# -- e: training -----------------------------------------------------------------------------------------------------


TRAINED = {SORSA(rank=4): 1e-2, LoRA(rank=4): 1e-2, PiSSA(rank=4): 1e-2, SVFT(): 5e-2}  # method -> learning rate


@pytest.mark.parametrize(("version", "method"), covering(FILES, TRAINED), ids=lambda x: getattr(x, "name", x))
def test_fifty_steps_lower_the_loss(version: int, method: Any):
    layers = None if isinstance(method, SORSA) else LAYERS  # one method trains whole models
    found, ids, rate = model(version, torch.float32, layers).train(), tokens(9), TRAINED[method]
    adapter = attach(found, method, targets="rwkv")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=rate)
    losses = []
    for _ in range(50):
        value, penalty = loss(found, ids), adapter.penalty()
        (value if penalty is None else value + penalty).backward()
        adapter.before_step(rate)
        optimizer.step()
        adapter.after_step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.5 * losses[0], losses
    trained = logits(found.eval(), ids)
    adapter.merge()
    assert (logits(found, ids) - trained).abs().max() < 1e-4 * trained.abs().max()


# -- f: which weights, by which names --------------------------------------------------------------------------------

FEED = {"channel-mix.key": ["ffn.key"], "channel-mix.value": ["ffn.value"]}
NAMES: dict[str, dict[str, list[str]]] = {
    "rwkv4": {
        **{f"time-mix.{name}": [f"attention.{name}"] for name in ("receptance", "key", "value", "output")},
        **{f"channel-mix.{name}": [f"feed_forward.{name}"] for name in ("receptance", "key", "value")},
    },
    "rwkv6": {
        **{f"time-mix.{name}": [f"att.{name}"] for name in ("receptance", "key", "value", "gate", "output")},
        "time-mix.decay": ["att.time_decay_w1", "att.time_decay_w2"],
        "time-mix.shift": ["att.time_maa_w1", "att.time_maa_w2"],
        "channel-mix.receptance": ["ffn.receptance"],
        **FEED,
    },
    "rwkv7": {
        **{f"time-mix.{name}": [f"attn.{name[0]}_proj"] for name in ("receptance", "key", "value", "output")},
        "time-mix.decay": ["attn.w_lora.lora.0", "attn.w_lora.lora.2"],
        "time-mix.rate": ["attn.a_lora.lora.0", "attn.a_lora.lora.2"],
        "time-mix.gate": ["attn.g_lora.lora.0", "attn.g_lora.lora.2"],
        "time-mix.value-residual": ["attn.v_lora.lora.0", "attn.v_lora.lora.2"],
        **FEED,
    },
    "official7": {
        **{f"time-mix.{name}": [f"att.{name}"] for name in ("receptance", "key", "value", "output")},
        "time-mix.decay": ["att.w1", "att.w2"],
        "time-mix.rate": ["att.a1", "att.a2"],
        "time-mix.gate": ["att.g1", "att.g2"],
        "time-mix.value-residual": ["att.v1", "att.v2"],
        **FEED,
    },
}
BLOCKS = {"rwkv4": "rwkv.blocks", "rwkv6": "blocks", "rwkv7": "model.layers", "official7": "blocks"}
SHAPES = {  # (batch, out, in) of what is not a layer, or has a width of its own
    "attention.receptance": (1, 128, 128),
    "feed_forward.key": (1, 256, 128),
    "feed_forward.value": (1, 128, 256),
    "att.time_decay_w1": (1, 64, 128),
    "att.time_decay_w2": (1, 128, 64),
    "att.time_maa_w1": (1, 160, 128),
    "att.time_maa_w2": (5, 128, 32),
    **{f"att.{part}1": (1, 32, 64) for part in "wagv"},
    **{f"att.{part}2": (1, 64, 32) for part in "wagv"},
    **{f"attn.{part}_lora.lora.0": (1, 32, 64) for part in "wagv"},
    **{f"attn.{part}_lora.lora.2": (1, 64, 32) for part in "wagv"},
}
RAW = {"att.time_decay_w1", "att.time_decay_w2", "att.time_maa_w1", "att.time_maa_w2"}
RAW |= {f"att.{part}{i}" for part in "wagv" for i in "12"}


def spelled(spelling: str) -> nn.Module:
    """A model in float64 with the names of one implementation; flash-linear-attention's are those of rwkv7-hf."""
    ours: dict[str, type[nn.Module]] = {"official7": Plain7, "fla7": Fla7}
    return spell(ours[spelling]) if spelling in ours else model(int(spelling[-1]))


def names_of(spelling: str, *roles: str) -> set[str]:
    """Every site of some roles, or of all, in every block: RWKV-7 mixes no earlier value in the first."""
    table = NAMES["rwkv7" if spelling == "fla7" else spelling]
    block = BLOCKS["rwkv7" if spelling == "fla7" else spelling]
    return {
        f"{block}.{i}.{name}"
        for role, names in table.items()
        for name in names
        for i in range(1 if role == "time-mix.value-residual" else 0, 4 if spelling == "rwkv4" else 12)
        if not roles or role in roles
    }


every_spelling = pytest.mark.parametrize("spelling", [*NAMES, "fla7"])


@every_spelling
def test_every_matrix_is_adapted_and_reached(spelling: str):
    found = spelled(spelling)
    adapter = attach(found, LoRA(rank=2), targets="rwkv")
    assert set(adapter.sites) == names_of(spelling)
    perturb(adapter, 0.02)
    loss(found.train(), tokens(8)).backward()
    for name, site in adapter.sites.items():
        short = re.sub(r".*?\.\d+\.", "", name)
        assert site.shape == SHAPES.get(short, site.shape), name
        read = short in RAW or (spelling == "rwkv7" and short == "attn.w_lora.lora.2")  # rwkv7-hf takes its weight
        assert (site.path == "parametrised") == read, name
        if short in RAW:
            assert site.kind.name == "rwkv"
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().max() > 0), name


@every_spelling
@pytest.mark.parametrize("group", ["rwkv-time-mix", "rwkv-channel-mix"])
def test_groups(spelling: str, group: str):
    adapter = attach(spelled(spelling), LoRA(rank=2), targets=group)
    roles = [role for role in NAMES["rwkv7" if spelling == "fla7" else spelling] if f"rwkv-{role}".startswith(group)]
    assert set(adapter.sites) == names_of(spelling, *roles)


@every_spelling
def test_every_role_takes_its_own_method_and_rank(spelling: str):
    roles = NAMES["rwkv7" if spelling == "fla7" else spelling]
    chosen = {role: (LoRA, SORSA, PiSSA)[i % 3](rank=2 + i) for i, role in enumerate(roles)}
    adapter = attach(spelled(spelling), targets=chosen)
    assert set(adapter.sites) == names_of(spelling)
    for role, method in chosen.items():
        for name in names_of(spelling, role):
            assert adapter.sites[name].method == method, name


def test_rank_and_method_by_role_as_in_the_issue():
    adapter = attach(model(6), targets={"time-mix.receptance": SORSA(32), "time-mix.decay": LoRA(8)})
    assert set(adapter.sites) == names_of("rwkv6", "time-mix.receptance", "time-mix.decay")
    assert adapter.sites["blocks.3.att.receptance"].method == SORSA(32)
    assert adapter.sites["blocks.3.att.time_decay_w2"].method == LoRA(8)


VECTORS = {"rwkv4": "time_decay", "rwkv6": "time_decay", "rwkv7": "w_lora.lora.2.bias", "official7": "w0"}


@pytest.mark.parametrize("spelling", VECTORS)
def test_vectors_are_trained_whole(spelling: str):
    found = spelled(spelling)
    before = {name: value.clone() for name, value in found.named_parameters()}
    adapter = attach(found, LoRA(rank=2), targets=["time-mix.receptance"], train=(VECTORS[spelling],))
    trained = {name for name, p in found.named_parameters() if p.requires_grad and ".svdpeft." not in name}
    assert trained == {name for name in before if name.endswith(f".{VECTORS[spelling]}")}
    assert len(trained) == (4 if spelling == "rwkv4" else 12)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    loss(found.train(), tokens(8)).backward()
    optimizer.step()
    now = dict(found.named_parameters())
    assert {name for name, value in before.items() if not torch.equal(now[name], value)} == trained
    adapter.detach()
    assert all(equal_bits(now[name], value) for name, value in before.items())


# -- g: one model under three sets of names --------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SORSA(rank=3), *([PiSSA(rank=3), SVFT()] if EVERYTHING else [])], ids=str)
def test_the_spellings_of_rwkv7_are_one_model(method: Any):
    """The same update of the same official weight gives the same logits and the same file, transposed where it must."""
    files, outputs = [], []
    for spelling in ("official7", "rwkv7", "fla7"):
        found = spelled(spelling)
        adapter = attach(found, method, targets="rwkv")
        for name, site in adapter.sites.items():
            _move(site.factors, official(name))
        outputs.append(logits(found, tokens(9)))
        adapter.merge()
        files.append(rwkv.official_state(found))
    for out, written in zip(outputs[1:], files[1:], strict=True):
        close(out, outputs[0])
        for name, value in files[0].items():
            close(written[name], value)
    assert (outputs[0] - logits(model(7), tokens(9))).abs().max() > 1e-3
    w1 = "blocks.5.att.w1"
    assert (files[0][w1] - state(7)[w1]).abs().max() > 1e-4


def official(name: str) -> str:
    """Official name of the weight of a site, so that the same one is moved alike under every spelling."""
    key = name if re.search(r"\.[wagv][12]$", name) else f"{name}.weight"
    return rwkv_layout.official_name(key)


def _move(factors: nn.Module, name: str) -> None:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    with torch.no_grad():
        for parameter in factors.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
