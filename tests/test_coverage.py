"""A quick part of the sweep over timm and transformers, by the sweep's own checks, and the pages that it wrote."""

import re
from pathlib import Path

import pytest
import timm
import torch
from rows import EVERYTHING

import svdpeft
from benchmarks.coverage import timm_models, transformers_models
from benchmarks.coverage.check import Row, check, perturb
from benchmarks.coverage.page import page

ROOT = Path(__file__).parent.parent

TIMM = [
    "beit_base_patch16_224",  # reads qkv.weight
    "csatv2",  # matrices with one row
    "eva02_tiny_patch14_224",
    "nf_resnet26",  # weight standardisation
    *(["resnetv2_18", "swinv2_tiny_window8_256"] if EVERYTHING else []),
    "test_convnext",
    "test_efficientnet",
    "test_maxvit" if timm.is_model("test_maxvit") else "maxxvit_rmlp_nano_rw_256",  # from timm 1.0.31 on
    "test_resnet",
    "test_vit",
    "tf_efficientnet_cc_b0_4e",  # convolutions mixed from experts
]
TRANSFORMERS = [
    "albert",  # one layer, called twice
    "bart",
    "beit",
    "deepseek-v3",
    "gpt-oss",  # experts stored (in, out)
    "gpt2",
    "llama",
    "mamba",
    "mixtral",
    "qwen3-next",
    "switch-transformers",
    "t5",
    "wav2vec2",  # weight normalisation
    "wavlm",  # reads the weights of its projections
]
CASES = {case.label.partition("@")[0]: case for case in timm_models.cases()}
CASES |= {f"transformers-{case.family}": case for case in transformers_models.cases()}


@pytest.mark.parametrize("name", [*TIMM, *(f"transformers-{name}" for name in TRANSFORMERS)])
@pytest.mark.apart
def test_every_weight_of_a_network_is_adapted_or_named_and_comes_back(name):
    row = check(CASES[name])
    assert row.adapted > 0


@pytest.mark.parametrize(("library", "least"), [("timm", 60), ("transformers", 40)])
def test_the_committed_page_names_enough_families_and_no_failure(library, least):
    text = (ROOT / "docs" / f"coverage-{library}.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len({row[0] for row in rows}) >= least
    assert "**failed**" not in text
    assert re.search(r"\b0 failed", text)
    assert all(int(row[2]) > 0 for row in rows)


def test_experts_give_the_same_in_a_loop_in_one_grouped_product_and_merged():
    model, forward = CASES["transformers-mixtral"].make()
    adapter = svdpeft.attach(model.eval(), svdpeft.LoRA(rank=2), targets="all")
    perturb(adapter)
    with torch.no_grad():
        looped = forward(model).logits
        model.set_experts_implementation("grouped_mm")
        torch.testing.assert_close(forward(model).logits, looped)
        adapter.merge()
        torch.testing.assert_close(forward(model).logits, looped)


def test_a_family_without_an_entry_is_picked_by_rule(monkeypatch):
    monkeypatch.delitem(timm_models.MODELS, "starnet")
    assert [case.label for case in timm_models.cases() if case.family == "starnet"] == ["starnet_s050@64"]


def test_a_model_that_fails_is_a_row_of_the_page():
    text = page("timm", [Row("beit", "beit@64", error="no")])
    assert "| beit | beit@64 | 0 |  |  |  | **failed**: no |" in text
