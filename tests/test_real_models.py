"""From end to end on the three real models: attach, perturb, merge, save, load, detach; and a short training."""

import pytest
import torch
import transformers
from helpers import digests
from rows import EVERYTHING, some

import svdpeft
from svdpeft.models import load
from svdpeft.models.embedded import AssetError
from svdpeft.tasks.mnist5k import Mnist5k

pytestmark = pytest.mark.apart
INPUTS = {
    "efficientnet-lite0": lambda: torch.randn(2, 3, 64, 64),
    "dinov2-vits14": lambda: torch.randn(2, 3, 56, 56),
    "smollm2-135m": lambda: torch.arange(20, 32)[None],
}
LIVES = {
    "efficientnet-lite0": [(svdpeft.SORSA(rank=4), "all"), (svdpeft.SVFT(pattern="banded"), "all")],
    "dinov2-vits14": [(svdpeft.SVFT(), ["qkv"]), (svdpeft.PiSSA(rank=4), "all-linear")],
    "smollm2-135m": [
        (svdpeft.SVFT(pattern="random"), [r".*layers\.(0|9)\..*_proj"]),
        (svdpeft.SORSA(rank=8, driver="randomized"), "all-linear"),
    ],
}
CASES = [(name, *life) for name, lives in LIVES.items() for life in (lives if EVERYTHING else lives[:1])]


def real(name, **options):
    try:
        return load(name, **options)
    except AssetError as error:
        pytest.skip(str(error))


def ten_layers(name):
    """The language model with ten of its thirty layers, in float32: whole it is half a gigabyte on every worker."""
    model = real(name, dtype=torch.bfloat16).model
    model.model.layers = model.model.layers[:10]
    model.config.num_hidden_layers = 10
    return model.float()


@torch.no_grad()
def output(model, x):
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


@pytest.mark.parametrize(("name", "method", "targets"), CASES, ids=lambda value: str(value)[:40])
def test_the_whole_life_of_an_adapter(name, method, targets, tmp_path):
    x = INPUTS[name]()
    model = ten_layers(name) if name == "smollm2-135m" else real(name, image_size=x.shape[-1]).model
    base = output(model, x)
    before = digests(model)
    adapter = svdpeft.attach(model, method, targets, clip_rank=True)
    assert torch.equal(output(model, x), base)

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapter.parameters():
            size = 0.02 * p.abs().mean() if p.any() else 0.1  # what starts at zero is a core or LoRA's L
            p.add_(size * torch.randn(p.shape, generator=generator))
    tuned = output(model, x)
    size = (tuned - base).abs().max()
    assert size > 1e-3 * base.abs().max()
    with adapter.disabled():
        assert torch.equal(output(model, x), base)

    report = adapter.merge()
    assert report.worst < 1e-2  # float32 weights: rounding to them may lose that much of a small update
    assert (output(model, x) - tuned).abs().max() < 1e-3 * tuned.abs().max()
    adapter.unmerge()
    assert torch.equal(output(model, x), tuned)

    adapter.save(tmp_path / "adapter")
    adapter.detach()
    assert torch.equal(output(model, x), base)
    assert list(model.state_dict()) == list(before)
    assert digests(model) == before

    svdpeft.load(model, tmp_path / "adapter")
    assert torch.equal(output(model, x), tuned)


def test_an_adapter_for_one_model_is_refused_by_another(tmp_path):
    cnn = real("efficientnet-lite0").model
    svdpeft.attach(cnn, svdpeft.LoRA(rank=1), ["conv_head"]).save(tmp_path / "adapter")
    other = real("efficientnet-lite0").model
    with torch.no_grad():
        other.conv_head.weight[0, 0] += 1e-3
    with pytest.raises(svdpeft.CheckpointError, match="first weight that differs is conv_head"):
        svdpeft.load(other, tmp_path / "adapter")
    vit = real("dinov2-vits14", image_size=56).model
    with pytest.raises(svdpeft.CheckpointError, match="conv_head"):
        svdpeft.load(vit, tmp_path / "adapter")


def test_the_tied_head_of_a_language_model_stays_tied():
    model = real("smollm2-135m").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=2), "all-linear")
    assert "lm_head" in adapter.skipped
    adapter.detach()
    alone = svdpeft.attach(model, svdpeft.LoRA(rank=2), ["lm_head"])
    with pytest.raises(ValueError, match=r"lm_head cannot be merged: model\.embed_tokens has the same weight"):
        alone.merge()
    assert alone.sites["lm_head"].weight.stored is model.model.embed_tokens.weight


@pytest.mark.parametrize("method", some([svdpeft.SORSA(rank=4), svdpeft.SVFT(pattern="topk")], "digits"), ids=str)
def test_a_few_steps_on_real_digits_lower_the_loss(method, tmp_path):
    loaded = real("efficientnet-lite0", num_classes=10, image_size=32)
    try:
        data = Mnist5k(train_size=160, test_size=20).prepare(loaded)
    except AssetError as error:
        pytest.skip(str(error))
    model = loaded.model
    adapter = svdpeft.attach(model, method, ["conv_pw", "conv_pwl"], train=["classifier"], clip_rank=True)
    args = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=40,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    run = svdpeft.Trainer(model=model, adapter=adapter, args=args, train_dataset=data.train, data_collator=data.collate)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
