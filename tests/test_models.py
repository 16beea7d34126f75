"""The embedded models end to end: real weights, real answers. Skipped, with the reason, without them."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import digests
from torch import Tensor

from svdpeft.models import Loaded, convert, embedded, load

pytestmark = pytest.mark.apart
PARAMETERS = {
    "efficientnet-lite0": 4_652_008,
    "dinov2-vits14": 22_056_192,
    "smollm2-135m": 134_515_008,
    "minilm-l6": 22_713_216,
}
_missing: dict[str, str] = {}


def model(name: str, **options: Any) -> Loaded:
    """``load``, or a skip that says why; an asset that could not be fetched is not tried again."""
    if name not in _missing:
        try:
            return load(name, **options)
        except embedded.AssetError as error:
            _missing[name] = str(error)
    pytest.skip(_missing[name])


def pictures(loaded: Loaded) -> Tensor:
    """scikit-learn's two sample pictures, a palace in China and a flower, as the model wants them."""
    datasets = pytest.importorskip("sklearn.datasets")
    from PIL import Image
    from timm.data import create_transform

    transform: Any = create_transform(**loaded.processor)
    return torch.stack([transform(Image.fromarray(image)) for image in datasets.load_sample_images().images])


@torch.no_grad()
def run(loaded: Loaded, x: Tensor) -> Tensor:
    return loaded.model(x)


@pytest.mark.parametrize("name", PARAMETERS)
def test_size_and_same_twice(name: str) -> None:
    options = {"dtype": torch.bfloat16} if name == "smollm2-135m" else {}  # in float32 it is half a gigabyte
    first = model(name, **options)
    assert sum(parameter.numel() for parameter in first.model.parameters()) == PARAMETERS[name]
    assert first.name == name
    assert not first.model.training
    kept = digests(first.model)
    with torch.no_grad():
        for p in first.model.parameters():
            p.add_(1)  # training must never reach the file in the cache
    assert digests(first.model) != kept
    del first
    gc.collect()  # a model is a cycle
    assert digests(model(name, **options).model) == kept


def test_efficientnet_sees_palace_and_daisy() -> None:
    loaded = model("efficientnet-lite0")
    assert loaded.modality == "vision"
    assert loaded.head == "classifier"
    assert set(loaded.processor) == {"input_size", "mean", "std", "interpolation", "crop_pct"}
    assert run(loaded, pictures(loaded)).argmax(1).tolist() == [698, 985]


def test_efficientnet_image_size() -> None:
    loaded = model("efficientnet-lite0", image_size=160)
    x = pictures(loaded)
    assert x.shape == (2, 3, 160, 160)
    assert run(loaded, x).argmax(1)[0] == 698


@pytest.mark.parametrize("size", [98, 224])
def test_dinov2_crops_of_one_picture_are_alike(size: int) -> None:
    loaded = model("dinov2-vits14", image_size=size)
    assert loaded.head is None
    assert loaded.processor["input_size"] == (3, size, size)
    whole = pictures(loaded)
    cut = size // 8
    crops = F.interpolate(whole[..., cut:, cut:], size=(size, size), mode="bicubic", antialias=True)
    features = F.normalize(run(loaded, torch.cat([whole, crops])), dim=-1)  # (palace, flower, palace', flower')
    similarity = features @ features.T
    assert min(similarity[0, 2], similarity[1, 3]) > 0.9
    assert max(similarity[0, 1], similarity[0, 3], similarity[1, 2]) < 0.7


def test_dinov2_native_size_is_518() -> None:
    native, asked = model("dinov2-vits14"), model("dinov2-vits14", image_size=518)
    assert native.processor == asked.processor
    assert native.processor["input_size"] == (3, 518, 518)
    here, there = native.model.state_dict(), asked.model.state_dict()
    assert all(torch.equal(value, there[key]) for key, value in here.items())


@pytest.fixture
def converted_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The conversion itself, whatever the cache holds of an earlier one."""

    def once(name: str, fill: Callable[[Path], None]) -> Path:
        if not (folder := tmp_path / name).exists():
            folder.mkdir()
            fill(folder)
        return folder

    monkeypatch.setattr(convert, "cache", SimpleNamespace(once=once))


def test_dinov2_equals_its_onnx_graph(converted_anew: None) -> None:
    """The slow path that the conversion must equal: ONNX's own NumPy evaluator on the published file."""
    onnx = pytest.importorskip("onnx", minversion="1.22")  # before, it resizes in loops of Python: an hour
    from onnx.reference import ReferenceEvaluator

    loaded = model("dinov2-vits14", image_size=112)
    last = "/backbone/layernorm/Add_1"
    proto = onnx.load(embedded.fetch("dinov2-vits14"))
    end = [node.name for node in proto.graph.node].index(last) + 1
    del proto.graph.node[end:], proto.graph.output[:]  # the saliency decoder
    proto.graph.output.append(onnx.helper.make_tensor_value_info(f"{last}_output_0", onnx.TensorProto.FLOAT, None))
    x = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    (output,) = ReferenceEvaluator(proto).run(None, {"input_image": x.numpy()})
    expected = torch.as_tensor(output)

    vit: Any = loaded.model
    with torch.no_grad():
        # timm smooths when it shrinks the position embeddings, the graph does not: a small difference.
        assert F.cosine_similarity(vit.forward_features(x), expected, dim=-1).min() > 0.99
        whole = model("dinov2-vits14").model.get_parameter("pos_embed")  # (1, 1 + 37 * 37, 384)
        grid = whole[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(8, 8), mode="bicubic").flatten(2).mT
        vit.pos_embed.copy_(torch.cat([whole[:, :1], grid], dim=1))
        assert (vit.forward_features(x) - expected).abs().max() < 1e-4  # of values up to 8


def test_smollm2_knows_paris_and_splits_digits_first() -> None:
    loaded = model("smollm2-135m")
    assert loaded.modality == "language"
    assert loaded.head is None
    tokenizer, smol = loaded.processor, loaded.model
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = smol.generate(**inputs, max_new_tokens=12, do_sample=False)  # type: ignore[operator]
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert tokenizer.tokenize("A:\n\n12  3") == ["A", ":", "ĊĊ", "1", "2", "ĠĠ", "3"]


def test_minilm_similarity() -> None:
    loaded = model("minilm-l6")
    sentences = ["A man is eating food.", "Someone is having a meal.", "The stock market fell sharply today."]
    batch = loaded.processor(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        tokens = loaded.model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = F.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)
    assert mean[0] @ mean[1] > 0.6 > 0.2 > mean[0] @ mean[2]


def test_fresh_classifier_depends_on_the_seed_alone() -> None:
    model("dinov2-vits14")  # converted, or skipped, before the random state is watched
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load("dinov2-vits14", num_classes=10, image_size=98, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    same = load("dinov2-vits14", num_classes=10, image_size=70, seed=1)
    other = load("dinov2-vits14", num_classes=10, image_size=98, seed=2)
    assert first.head == "head"
    assert first.processor["input_size"] == (3, 98, 98)
    weight = first.model.get_parameter("head.weight")
    assert weight.shape == (10, 384)
    assert all(not parameter.is_meta and parameter.requires_grad for parameter in first.model.parameters())
    assert torch.equal(weight, same.model.get_parameter("head.weight"))
    assert not torch.equal(weight, other.model.get_parameter("head.weight"))
    assert run(first, torch.zeros(2, 3, 98, 98)).shape == (2, 10)


def test_fresh_classifier_of_a_convolutional_network() -> None:
    loaded = model("efficientnet-lite0", num_classes=7)
    assert loaded.head == "classifier"
    assert loaded.model.get_submodule("classifier").weight.shape == (7, 1280)


def test_timm_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    asked: list[dict[str, Any]] = []
    create: Any = timm.create_model

    def offline(name: str, **options: Any) -> torch.nn.Module:
        asked.append(options)
        return create(name, **options | {"pretrained": False})

    monkeypatch.setattr(timm, "create_model", offline)
    vit = load("timm:vit_tiny_patch16_224", num_classes=5, image_size=96)
    assert vit.processor["input_size"] == (3, 96, 96)
    assert run(vit, torch.zeros(1, 3, 96, 96)).shape == (1, 5)
    cnn = load("timm:resnet10t", image_size=96)
    assert (cnn.head, cnn.processor["input_size"]) == ("fc", (3, 96, 96))
    assert asked == [{"pretrained": True, "img_size": 96}, {"pretrained": True}]
    with pytest.raises(ValueError, match=r"no single classifier but \('head', 'head_dist'\)"):
        load("timm:deit_tiny_distilled_patch16_224", num_classes=5)


def test_dtype() -> None:
    assert model("dinov2-vits14", dtype=torch.bfloat16).model.get_parameter("norm.weight").dtype == torch.bfloat16
    assert model("minilm-l6", dtype=torch.float64).model.dtype == torch.float64
    assert model("smollm2-135m", dtype=torch.bfloat16).model.dtype == torch.bfloat16


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A tiny causal language model with a tokenizer, in transformers' layout."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=4, **sizes)).save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "?": 3}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path)
    return tmp_path


def test_local_folder(tiny_folder: Path) -> None:
    loaded = load(str(tiny_folder), dtype=torch.bfloat16)
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert loaded.modality == "language"
    assert loaded.model.get_parameter("lm_head.weight").dtype == torch.bfloat16
    assert loaded.processor("b").input_ids == [1]


def test_python_files_beside_the_weights_are_run_where_that_is_asked_for_alone(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on the terminal."""
    config = json.loads((tiny_folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"}}
    (tiny_folder / "config.json").write_text(json.dumps(config))
    (tiny_folder / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Mine(LlamaConfig):\n    model_type = 'mine'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Mine\n"
    )
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked on the terminal"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(str(tiny_folder))
    assert type(load(str(tiny_folder), trust_remote_code=True).model).__name__ == "Model"


def test_local_folder_of_an_encoder(tiny_folder: Path) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    assert type(load(str(tiny_folder)).model).__name__ == "LlamaModel"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("smollm-135m", {}, "no model is called 'smollm-135m', .*did you mean 'smollm2-135m'"),
        ("hf:", {}, "no model is called 'hf:'"),
        ("timm:resnet81", {}, r"timm has no model 'resnet81': did you mean 'resnet\d+'"),
        ("dinov2-vits14", {"image_size": 100}, r"image_size 100 .*patch size 14 of .*: take 98 or 112$"),
        ("dinov2-vits14", {"image_size": 7}, r"image_size 7 .*: take 14$"),
        ("timm:vit_base_patch16_224", {"image_size": 230}, r"patch size 16 of .*: take 224 or 240$"),
        ("efficientnet-lite0", {"image_size": 0}, "image_size 0 is not a positive multiple"),
        ("dinov2-vits14", {"num_classes": 0}, "num_classes 0 is below 1 for 'dinov2-vits14'"),
        ("minilm-l6", {"num_classes": 1}, "num_classes 1 is below 2"),
        ("minilm-l6", {"image_size": 98}, "image_size=98 is for vision models; 'minilm-l6' is a language"),
    ],
)
def test_errors(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(name, **options)  # type: ignore[arg-type]


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load(str(tmp_path))


def test_import_is_light() -> None:
    heavy = "{'timm', 'transformers', 'onnx', 'gguf'}"
    code = f"import sys, svdpeft.models; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
