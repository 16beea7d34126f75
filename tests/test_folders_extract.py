"""Adapters extracted from the difference of two models on the disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_models import contents, gpt2, llama, mixtral, resnet, saved, tensors
from helpers import bits, perturb
from torch import Tensor

import svdpeft
from svdpeft import LoRA
from svdpeft.folders import extract, extracting, merge

Q = "model.layers.0.self_attn.q_proj"


def pair(tmp_path: Path, build: Any = llama, rank: int = 3, **options: Any) -> tuple[Path, Path]:
    """A base and what a training of a rank, and of some whole parameters, has made of it, in float64."""
    base = saved(build(torch.float64), tmp_path / "base")
    model = build(torch.float64)
    adapter = svdpeft.attach(model, LoRA(rank=rank), **{"targets": ["q_proj", "up_proj"], "train": ["norm"], **options})
    perturb(adapter)
    adapter.merge(permanent=True)
    return base, saved(model, tmp_path / "tuned")


def moved_by(base: Path, tuned: Path, name: str) -> Tensor:
    return tensors(tuned)[name] - tensors(base)[name]


@pytest.mark.parametrize("asked", [{"rank": 3}, {"energy": 1.0}], ids=str)
def test_a_difference_of_a_rank_is_found_again(asked: dict[str, Any], tmp_path: Path):
    base, tuned = pair(tmp_path, targets=["q_proj", "up_proj"], train=["norm", "lm_head"])
    found = extract(base, tuned, tmp_path / "out", **asked, name="difference")
    sites = {Q, "model.layers.0.mlp.up_proj"}
    assert found.ranks == dict.fromkeys(sites, 3)
    assert found.errors.keys() == sites
    assert max(found.errors.values()) < 1e-12
    assert set(found.whole) == {"model.norm.weight", "lm_head.weight"}
    assert "2 sites of rank 3, 2 whole" in str(found)
    model = llama(torch.float64)
    adapter = svdpeft.load(model, tmp_path / "out")
    assert adapter.name == "difference"
    assert set(adapter.whole) == set(found.whole)
    adapter.merge(permanent=True)
    expected = tensors(tuned)
    for name, w in model.state_dict().items():
        torch.testing.assert_close(w, expected[name], rtol=1e-12, atol=1e-13)
        if name.rpartition(".")[0] not in sites:
            assert bits(w) == bits(expected[name]), name
    merge(base, tmp_path / "out", tmp_path / "again")
    assert {name: t for name, (_, *t) in contents(tmp_path / "again").items()} == {
        name: [w.dtype, bits(w)] for name, w in model.state_dict().items()
    }


def test_what_a_rank_lacks_is_what_the_singular_values_say(tmp_path: Path):
    base, tuned = pair(tmp_path, rank=6)
    s = torch.linalg.svdvals(moved_by(base, tuned, f"{Q}.weight")).square()
    for rank in (1, 2, 5, 99):
        found = extract(base, tuned, tmp_path / f"rank{rank}", rank=rank)
        assert found.ranks[Q] == min(rank, 16)
        expected = math.sqrt(float(s[rank:].sum() / s.sum()))
        assert found.errors[Q] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    shares = s.cumsum(0) / s.sum()
    for energy in (1e-9, 0.3, 0.6, 0.9, 0.99, float(shares[1]) * (1 - 1e-9), float(shares[1]) * (1 + 1e-9)):
        found = extract(base, tuned, tmp_path / f"energy{energy}", energy=energy)
        assert found.ranks[Q] == int((shares < energy).sum()) + 1


def test_a_large_difference_is_found_by_energy(tmp_path: Path):
    """Where the decomposition is a randomised one, which is tried at growing ranks."""
    d = torch.randn(1100, 40, dtype=torch.float64) @ torch.randn(40, 1030, dtype=torch.float64)
    s = torch.linalg.svdvals(d).square()
    for energy in (0.5, 1.0):
        found = extracting._leading(d, None, energy, "d")
        assert len(found.s) == min(int((s.cumsum(0) / s.sum() < energy * (1 - 1e-12)).sum()) + 1, 40)
        left, right = found.balanced()
        share = float((left @ right).norm() ** 2 / d.norm() ** 2)
        assert share >= energy * (1 - 1e-9)


def test_half_precision_and_other_dtypes(tmp_path: Path):
    base = saved(llama(torch.bfloat16), tmp_path / "base")
    model = llama(torch.bfloat16).float()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight += 0.01
        model.model.norm.weight += 0.01
    tuned = saved(model, tmp_path / "tuned")
    found = extract(base, tuned, tmp_path / "out", rank=1)
    assert list(found.ranks) == [Q]
    assert found.errors[Q] < 1e-5
    assert found.whole == ("model.norm.weight",)
    wide = llama(torch.bfloat16).float()
    with pytest.warns(UserWarning, match="another precision|was made for a base in"):
        svdpeft.load(wide, tmp_path / "out").merge(permanent=True)
    for name, w in tensors(tuned).items():
        torch.testing.assert_close(wide.state_dict()[name], w, rtol=1e-5, atol=1e-6)


def tied(dtype: torch.dtype) -> Any:
    return llama(dtype, tie_word_embeddings=True)


def test_tied_weights(tmp_path: Path):
    base, tuned = pair(tmp_path, tied, targets=["embed_tokens", "lm_head"], train=[])
    found = extract(base, tuned, tmp_path / "out", rank=3, targets=["embed_tokens", "lm_head"])
    assert found.ranks == {"model.embed_tokens": 3}
    whole = extract(base, tuned, tmp_path / "whole", rank=3)
    assert (whole.ranks, whole.whole) == ({}, ("model.embed_tokens.weight",))
    for folder in ("out", "whole"):
        model = tied(torch.float64)
        svdpeft.load(model, tmp_path / folder).merge(permanent=True)
        torch.testing.assert_close(model.lm_head.weight, tensors(tuned)["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match=r"lm_head differs.*model\.embed_tokens and lm_head: name all"):
        extract(base, tuned, tmp_path / "alone", rank=3, targets=["lm_head"])
    assert not (tmp_path / "alone").exists()


def test_parts(tmp_path: Path):
    parts = ["c_attn[q]", "c_attn[v]"]
    base, tuned = pair(tmp_path, gpt2, targets=parts, train=[])
    found = extract(base, tuned, tmp_path / "out", rank=3, targets=parts)
    assert found.ranks == {"transformer.h.0.attn.c_attn[q]": 3, "transformer.h.0.attn.c_attn[v]": 3}
    model = gpt2(torch.float64)
    svdpeft.load(model, tmp_path / "out").merge(permanent=True)
    for name, w in tensors(tuned).items():
        torch.testing.assert_close(model.state_dict()[name], w, rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match=r"c_attn differs outside of its part q, which targets= names"):
        extract(base, tuned, tmp_path / "one", rank=3, targets=parts[:1])


def test_convolutions_and_running_statistics(tmp_path: Path):
    model, sizes = resnet(torch.float64)
    base = saved(model, tmp_path / "base", **sizes)
    adapter = svdpeft.attach(model, LoRA(rank=1), "all", train=["fc"], clip_rank=True)
    perturb(adapter, 0.01)
    model.train()(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    adapter.merge(permanent=True)
    tuned = saved(model, tmp_path / "tuned", **sizes)
    found = extract(base, tuned, tmp_path / "out", rank=1, targets="all")
    assert max(found.errors.values()) < 1e-10
    assert {"fc.weight", "fc.bias", "bn1.running_mean", "bn1.num_batches_tracked"} <= set(found.whole)
    fresh, _ = resnet(torch.float64)
    svdpeft.load(fresh, tmp_path / "out").merge(permanent=True)
    for name, w in tensors(tuned).items():
        torch.testing.assert_close(fresh.state_dict()[name], w, rtol=1e-10, atol=1e-11)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({"rank": None}, "give one of rank and energy"),
    "both": ({"energy": 0.5}, "give one of rank and energy"),
    "energy": ({"rank": None, "energy": 1.5}, r"energy 1\.5 is outside \(0, 1\]"),
    "rank": ({"rank": 0}, r"rank 0 is outside \[1, 16\]"),
    "targets": ({"targets": ["q_prj"]}, "did you mean 'q_proj'"),
    "no model": ({"tuned": "nowhere"}, "nowhere does not exist"),
    "itself": ({"tuned": "base"}, "no difference"),
    "another size": ({"tuned": "wide"}, r"is \[40, 16\] in base, \[40, 32\] in wide"),
    "another model": ({"tuned": "other"}, "base has lm_head.weight, and other does not"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    pair(tmp_path)
    saved(llama(torch.float64, hidden_size=32), tmp_path / "wide")
    saved(gpt2(torch.float64), tmp_path / "other")
    there = sorted(tmp_path.rglob("*"))
    options, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        extract(**{"base": "base", "tuned": "tuned", "out": "out", "rank": 2, **options})
    assert sorted(tmp_path.rglob("*")) == there


def test_what_is_not_finite_is_not_written(tmp_path: Path):
    base, _ = pair(tmp_path)
    for name in ("q_proj", "norm"):
        model = llama(torch.float64)
        w = model.get_parameter(f"{Q}.weight" if name == "q_proj" else "model.norm.weight")
        w.data.view(-1)[0] = float("nan")
        tuned = saved(model, tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name}.* (holds|hold) .*(NaN|not finite)"):
            extract(base, tuned, tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()


def test_a_tensor_with_another_name(tmp_path: Path):
    base = saved(mixtral(), tmp_path / "base")
    model = mixtral()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.add_(1)
    with pytest.raises(ValueError, match=r"experts.* differs, and no adapter holds it: .* another name"):
        extract(base, saved(model, tmp_path / "tuned"), tmp_path / "out", rank=1)


def test_another_file_is_not_overwritten(tmp_path: Path):
    base, tuned = pair(tmp_path)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        extract(base, tuned, tmp_path / "out", rank=1)
