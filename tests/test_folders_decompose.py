"""The cache of SVDs filled from a folder: what is attached afterwards finds all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folder_models import gpt2, llama, resnet, saved
from test_svd_cache import refuse

import svdpeft
from svdpeft import SORSA, PiSSA
from svdpeft.decomposition import svd
from svdpeft.folders import decompose

BUILDS: dict[str, tuple[Any, Any]] = {
    "llama": (llama, None),
    "named": (llama, ["q_proj", "down_proj"]),
    "parts": (gpt2, ["c_attn[q]", "c_proj"]),
    "tied": (lambda: llama(tie_word_embeddings=True), ["embed_tokens", "lm_head"]),
    "convolutions": (lambda: resnet()[0], None),
}


@pytest.mark.parametrize("case", BUILDS)
def test_what_is_attached_afterwards_computes_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    build, targets = BUILDS[case]
    model = build()
    saved(model, tmp_path / "base", **({"num_classes": 3} if case == "convolutions" else {}))
    plain = svdpeft.attach(build(), PiSSA(rank=2), targets, clip_rank=True)
    found = decompose(tmp_path / "base", 2, tmp_path / "cache", targets)
    assert list(found.sites) == list(plain.sites)
    assert 0 < len(found.computed) <= len(found.sites)
    refuse(monkeypatch)
    with svdpeft.svd_cache(tmp_path / "cache"):
        adapter = svdpeft.attach(model, PiSSA(rank=2), targets, clip_rank=True)
        rank = 2 if case == "convolutions" else 1  # the large ones among them serve the one rank
        svdpeft.attach(model.float(), SORSA(rank=rank), targets, clip_rank=True, name="other")
    for name, site in adapter.sites.items():
        for role, t in site.factors.tensors().items():
            assert torch.equal(t, plain.sites[name].factors.tensors()[role])
    again = decompose(tmp_path / "base", 2, tmp_path / "cache", targets)
    assert (again.sites, again.computed) == (found.sites, ())
    assert "0 decomposed" in str(again)


def test_the_seed_is_that_of_attach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Large weights are decomposed by a randomised driver, whose start has a seed."""
    model = llama(torch.float32, hidden_size=1024, num_attention_heads=2, intermediate_size=1032)
    saved(model, tmp_path / "base")
    decompose(tmp_path / "base", 3, tmp_path / "cache", ["up_proj"], seed=5)
    refuse(monkeypatch)
    with svdpeft.svd_cache(tmp_path / "cache"):
        svdpeft.attach(model, PiSSA(rank=3), ["up_proj"], seed=5).detach()
        with pytest.raises(pytest.fail.Exception, match="computed again"):
            svdpeft.attach(model, PiSSA(rank=3), ["up_proj"], seed=6)


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved(llama(), tmp_path / "base")
    with monkeypatch.context() as patch:
        exact, left = svd.full_svd, [None] * 3

        def stopping(*args: Any) -> Any:
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return exact(*args)

        patch.setattr(svd, "full_svd", stopping)
        with pytest.raises(KeyboardInterrupt):
            decompose(tmp_path / "base", 2, tmp_path / "cache")
    found = decompose(tmp_path / "base", 2, tmp_path / "cache")
    assert (len(found.sites), len(found.computed)) == (7, 4)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"folder": "nowhere"}, "nowhere does not exist"),
    "targets": ({"targets": ["q_prj"]}, "did you mean 'q_proj'"),
    "rank": ({"rank": 0}, "rank 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    saved(llama(), tmp_path / "base")
    options, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        decompose(**{"folder": "base", "rank": 2, "cache": "cache", **options})
    assert not list(tmp_path.glob("cache/*"))
