"""A quick part of the sweep over timm and transformers, by the sweep's own checks, and the pages that it wrote."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

import svdpeft

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("model_coverage", ROOT / "benchmarks" / "coverage.py")
coverage = sys.modules["model_coverage"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(coverage)

TIMM = [
    "beit_base_patch16_224",  # reads qkv.weight
    "csatv2",  # matrices with one row
    "eva02_tiny_patch14_224",
    "nf_resnet26",  # weight standardisation
    "resnetv2_18",
    "swinv2_tiny_window8_256",
    "test_convnext",
    "test_efficientnet",
    "test_maxvit",
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
CASES = {case.label.partition("@")[0]: case for case in coverage.timm_cases()}
CASES |= {f"transformers-{case.family}": case for case in coverage.transformers_cases()}


@pytest.mark.parametrize("name", [*TIMM, *(f"transformers-{name}" for name in TRANSFORMERS)])
def test_every_weight_of_a_network_is_adapted_or_named_and_comes_back(name):
    row = coverage.check(CASES[name])
    assert row.adapted > 0


@pytest.mark.parametrize(("library", "least"), [("timm", 60), ("transformers", 40)])
def test_the_committed_page_names_enough_families_and_no_failure(library, least):
    page = (ROOT / "docs" / f"coverage-{library}.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len({row[0] for row in rows}) >= least
    assert "**failed**" not in page
    assert re.search(r"\b0 failed", page)
    assert all(int(row[2]) > 0 for row in rows)


def test_experts_give_the_same_in_a_loop_in_one_grouped_product_and_merged():
    model, forward = CASES["transformers-mixtral"].make()
    adapter = svdpeft.attach(model.eval(), svdpeft.LoRA(rank=2), targets="all")
    coverage.perturb(adapter)
    with torch.no_grad():
        looped = forward(model).logits
        model.set_experts_implementation("grouped_mm")
        torch.testing.assert_close(forward(model).logits, looped)
        adapter.merge()
        torch.testing.assert_close(forward(model).logits, looped)


def test_a_family_without_an_entry_is_picked_by_rule(monkeypatch):
    monkeypatch.delitem(coverage.TIMM, "starnet")
    assert [case.label for case in coverage.timm_cases() if case.family == "starnet"] == ["starnet_s050@64"]


def test_a_model_that_fails_is_a_row_of_the_page():
    text = coverage.page("timm", [coverage.Row("beit", "beit@64", error="no")])
    assert "| beit | beit@64 | 0 |  |  |  | **failed**: no |" in text
