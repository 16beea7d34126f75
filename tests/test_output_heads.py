"""What "all-linear" leaves alone: the layers that give what the task asks for, of timm's and transformers' models."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import transformers

from svdpeft import LoRA, attach
from svdpeft.targets.inventory import weights_of

TIMM = {
    "deit_tiny_distilled_patch16_224": {"head", "head_dist"},
    "levit_128s": {"head.linear", "head_dist.linear"},
    "efficientformer_l1": {"head", "head_dist"},
    "swiftformer_xs": {"head", "head_dist"},
    "volo_d1_224": {"head", "aux_head"},
    "repvit_m0_9": {"head.head.l", "head.head_dist.l"},
    "caformer_s18": {"head.fc.fc1", "head.fc.fc2"},
    "resnet18": {"fc"},
}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30}
TRANSFORMERS = {
    "LlamaForSequenceClassification": {"score"},
    "LlamaForTokenClassification": {"score"},
    "LlamaForQuestionAnswering": {"qa_outputs"},
    "LlamaForCausalLM": {"lm_head"},
    "BertForSequenceClassification": {"classifier"},
    "BertForTokenClassification": {"classifier"},
    "BertForMultipleChoice": {"classifier"},
    "BertForQuestionAnswering": {"qa_outputs"},
    "BertForNextSentencePrediction": {"cls.seq_relationship"},
    "BertForMaskedLM": {"cls.predictions.decoder"},
    "RobertaForSequenceClassification": {"classifier.out_proj"},
    "DistilBertForSequenceClassification": {"classifier"},
    "BartForSequenceClassification": {"classification_head.out_proj"},
    "ViTForImageClassification": {"classifier"},
    "Wav2Vec2ForCTC": {"lm_head"},
    "Wav2Vec2ForSequenceClassification": {"classifier"},
    "WhisperForAudioClassification": {"classifier"},
    "GPT2ForSequenceClassification": {"score"},
    "LlamaModel": set(),
}


def build(name: str) -> Any:
    with torch.device("meta"):
        if name in TIMM:
            return timm.create_model(name)
        config = getattr(transformers, name.split("For")[0].removesuffix("Model") + "Config")
        return getattr(transformers, name)(
            config(**SMALL, num_labels=5, eos_token_id=1, bos_token_id=1, pad_token_id=0)
        )


@pytest.mark.parametrize("name", [*TIMM, *TRANSFORMERS])
def test_the_heads_are_known(name: str):
    assert {w.name for w in weights_of(build(name)) if w.head} == {**TIMM, **TRANSFORMERS}[name]


@pytest.mark.parametrize("name", ["RobertaForSequenceClassification", "Wav2Vec2ForCTC", "LlamaForQuestionAnswering"])
def test_all_linear_leaves_them_and_says_so(name: str):
    model = build(name).to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p)
    adapter = attach(model, LoRA(rank=1))
    for head in TRANSFORMERS[name]:
        assert head not in adapter.sites
        assert "head" in adapter.skipped[head]
    attach(model, LoRA(rank=1), sorted(TRANSFORMERS[name]), name="named")
