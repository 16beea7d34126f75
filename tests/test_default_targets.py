"""What is adapted where nobody says it: the first line of the README works on transformers and on CNNs."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers
from helpers import refused
from torch import nn

import svdpeft
from svdpeft import SORSA, LoRA, attach
from svdpeft.targets.rules import default_targets


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mobilenetv3_small_050", "all"),
        ("resnet10t", "all"),
        ("tf_efficientnet_lite0", "all"),
        ("vit_tiny_patch16_224", "all-linear"),
        ("convnext_tiny", "all-linear"),
        ("mixer_s32_224", "all-linear"),
    ],
)
def test_of_timm(name: str, expected: str):
    with torch.device("meta"):
        assert default_targets(timm.create_model(name)) == expected


def test_of_language_models():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=5000))
    assert default_targets(model) == "all-linear", "an embedding is no convolution"
    assert default_targets(nn.Linear(4, 3)) == "all-linear"


def test_a_cnn_works_from_the_first_line_and_says_what_was_lowered():
    model = timm.create_model("mobilenetv3_small_050", num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    base = model(x)
    adapter = attach(model, SORSA(rank=16))
    torch.testing.assert_close(model(x), base)
    assert any(".conv_dw" in name for name in adapter.sites)
    assert "classifier" in adapter.skipped
    text = adapter.summary()
    (line,) = [line for line in text.splitlines() if line.startswith("rank lowered to what the matrix has: ")]
    assert "blocks.*.*.conv_dw" in line
    seen = svdpeft.calibrate(model, [x])
    assert set(seen) >= {name for name in adapter.sites if "conv_pw" in name}


def test_what_is_asked_for_is_not_lowered_in_silence():
    model = timm.create_model("mobilenetv3_small_050", num_classes=3)
    with refused(model, "clip_rank=True lowers it there"):
        attach(model, SORSA(rank=16), "all")
    cnn = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with refused(cnn, "targets='all' takes convolutions and the like, too"):
        attach(cnn, LoRA(rank=2), "all-linear")
    assert "lowered" not in attach(cnn, LoRA(rank=2)).summary()
    with refused(cnn, "outside [1, 4]"):
        attach(cnn, LoRA(rank=5), name="b", clip_rank=False)
    with refused(nn.Sequential(nn.Linear(6, 5)), "outside [1, 5]"):  # a matrix that is too small is a mistake there
        attach(nn.Sequential(nn.Linear(6, 5)), LoRA(rank=6))
