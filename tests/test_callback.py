"""``AdapterCallback`` in a stock trainer: what ``svdpeft.Trainer`` does, and adapters alone on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rows import covering
from safetensors.torch import load_file
from test_trainer import KEEP_BEST, WithLoss, arguments, data, make, trainer, values
from torch import Tensor, nn
from torch.nn import functional as F

import svdpeft
from svdpeft import SORSA, LoRA, PiCa, PiSSA


class Llama:
    """A tiny causal model, which normalises its loss over the accumulated batch; its head is its embedding."""

    def __new__(cls) -> Any:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            vocab_size=30,
            tie_word_embeddings=True,
        )
        return transformers.LlamaForCausalLM(config)


def texts(count: int) -> list[dict[str, Tensor]]:
    """Of unequal numbers of labels, so that the mean of means is another than the mean."""
    g = torch.Generator().manual_seed(2)
    rows = []
    for i in range(count):
        ids = torch.randint(1, 30, (6,), generator=g)
        rows.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(6) < i % 4, -100)})
    return rows


def train(adapter: Any, folder: Path, stock: bool, rows: Any = None, resume: Any = None, **options: Any) -> Any:
    args = arguments(folder, **options)
    own = {"callbacks": [svdpeft.AdapterCallback(adapter)]} if stock else {}
    cls = transformers.Trainer if stock else svdpeft.Trainer
    run = trainer(adapter.model, adapter, args, cls, train_dataset=data() if rows is None else rows, **own)
    run.train(resume_from_checkpoint=resume)
    return run


# A penalty of the loss is what a last step with fewer batches could weigh wrongly: 10 is its count.
@pytest.mark.parametrize(("count", "mode"), covering([10, 8, 7], ["loss", "gradient", "decoupled"]))
@pytest.mark.parametrize(("make_model", "rows", "targets"), [(Llama, texts, ["q_proj"]), (WithLoss, data, ["body"])])
def test_the_penalty_does_not_depend_on_gradient_accumulation(make_model, rows, targets, count, mode, tmp_path):
    """Two batches of four rows are one of eight, and the last step of an epoch has fewer batches; so with ours."""
    found = {}
    for stock in (False, True):
        for batch, accumulation in ((2, 4), (1, 8), (8, 1)):
            torch.manual_seed(0)
            model = make_model()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm1d):
                    module.track_running_stats = False
            if hasattr(model, "norm"):
                model.norm = nn.Identity()
            adapter = svdpeft.attach(model, SORSA(rank=2, gamma=0.05, mode=mode), targets)
            train(
                adapter,
                tmp_path,
                stock,
                rows(count),
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                num_train_epochs=2,
                max_steps=-1,
                optim="sgd",
                learning_rate=0.5,
                max_grad_norm=0.0,
            )
            found[stock, batch] = values(adapter)
    for name, value in found[False, 8].items():
        for stock in (False, True):
            for batch in (8, 2, 1):
                if make_model is WithLoss and count == 7 and batch == 2:
                    continue  # its mean of means weighs the row of the last batch more, with any trainer
                torch.testing.assert_close(found[stock, batch][name], value, msg=f"{name} {stock} {batch}")


class Stop(transformers.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("again", ["stock", "own"])
def test_the_penalty_counts_once_after_a_training_that_was_interrupted(again, tmp_path):
    def run(interrupted: bool) -> dict[str, Tensor]:
        model = make(WithLoss)
        adapter = svdpeft.attach(model, SORSA(rank=2, gamma=0.05, mode="loss"), ["body"])
        start = values(adapter)
        if interrupted:
            callbacks = [svdpeft.AdapterCallback(adapter), Stop()]
            stopped = trainer(model, adapter, arguments(tmp_path), transformers.Trainer, callbacks=callbacks)
            with pytest.raises(KeyboardInterrupt):
                stopped.train()
            with torch.no_grad():
                for name, p in adapter.named_parameters():
                    p.copy_(start[name])
                    p.grad = None
            adapter.steps = 0
        train(adapter, tmp_path, again == "stock")
        assert not [hook for hook in model._forward_hooks.values() if "penalty" in getattr(hook, "__name__", "")]
        return values(adapter)

    for name, value in run(False).items():
        assert torch.equal(run(True)[name], value), name


CASES = {
    "causal": (Llama, texts, LoRA(rank=2), ["q_proj"], {}),
    "causal, SORSA": (Llama, texts, SORSA(rank=2, gamma=0.1), ["q_proj"], {}),
    "tied embedding": (Llama, texts, PiSSA(rank=2), ["lm_head", "embed_tokens"], {}),
    "shared factors": (Llama, texts, PiCa(rank=2), ["q_proj"], {}),
    "whole": (Llama, texts, LoRA(rank=2), ["q_proj"], {"train": ["norm"]}),
    "bare": (WithLoss, data, SORSA(rank=2), ["body"], {"train": ["head"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_are_adapters_and_resume_to_the_same_bits(case: str, tmp_path: Path):
    make_model, rows, method, targets, options = CASES[case]
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}

    def fresh() -> Any:
        torch.manual_seed(0)
        return svdpeft.attach(make_model(), method, targets, **options)

    adapter = fresh()
    train(adapter, tmp_path, True, rows(24), **args)
    through, statistics = values(adapter), {n: b.clone() for n, b in adapter.model.named_buffers()}
    checkpoint = tmp_path / "checkpoint-3"
    kept = load_file(checkpoint / "model.safetensors")
    assert set(adapter.whole) <= kept.keys()
    frozen = {name for name, p in adapter.model.named_parameters() if not p.requires_grad}
    assert not kept.keys() & frozen - {name for name in frozen if ".svdpeft." in name}
    if isinstance(adapter.model, transformers.PreTrainedModel):
        with pytest.raises((OSError, ValueError), match=r"config\.json"):
            transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
        assert "svdpeft.load(model" in (checkpoint / "README.md").read_text()

    torch.manual_seed(99)
    adapter = fresh()
    train(adapter, tmp_path, True, rows(24), resume=str(checkpoint), **args)
    for name, value in values(adapter).items():
        assert torch.equal(value, through[name]), name
    for name, buffer in adapter.model.named_buffers():
        assert torch.equal(buffer, statistics[name]), name

    alone = make_model()
    if make_model is not Llama:
        alone.load_state_dict({k: v for k, v in fresh().model.state_dict().items() if ".svdpeft." not in k})
    loaded = svdpeft.load(alone, tmp_path / "checkpoint-6")
    for name, value in values(loaded).items():
        assert torch.equal(value, through[name]), name


def test_resumed_into_another_folder(tmp_path: Path):
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    found = []
    for name in ("one", "two"):
        torch.manual_seed(0)
        adapter = svdpeft.attach(Llama(), LoRA(rank=2), ["q_proj"])
        resume = str(tmp_path / "one" / "checkpoint-3") if name == "two" else None
        train(adapter, tmp_path / name, True, texts(24), resume=resume, **args)
        found.append(values(adapter))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


def test_the_best_is_brought_back(tmp_path: Path):
    model = make(WithLoss)
    adapter = svdpeft.attach(model, LoRA(rank=2), ["body"])
    callbacks = [svdpeft.AdapterCallback(adapter)]
    args = arguments(tmp_path, **KEEP_BEST, learning_rate=30.0, optim="sgd")
    run = trainer(model, adapter, args, transformers.Trainer, callbacks=callbacks, eval_dataset=data(8))
    run.train()
    best = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(best), rel=1e-5)


def test_a_checkpoint_of_another_base_is_refused(tmp_path: Path):
    args = {"save_strategy": "steps", "save_steps": 2}
    train(svdpeft.attach(Llama(), LoRA(rank=2), ["q_proj"]), tmp_path, True, texts(8), **args)
    other = Llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    adapter = svdpeft.attach(other, LoRA(rank=2), ["q_proj"])
    with pytest.raises(svdpeft.CheckpointError, match="was saved for another base"):
        train(adapter, tmp_path, True, texts(8), resume=str(tmp_path / "checkpoint-2"), **args)


# -- save_pretrained -------------------------------------------------------------------------------------------------


def moved(adapter: Any) -> Any:
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
    return adapter


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(torch.arange(1, 9)[None]).logits


@pytest.mark.parametrize("method", [LoRA(rank=2), PiCa(rank=2)], ids=str)
def test_no_folder_loads_as_the_base(method, tmp_path: Path):
    model = Llama()
    base = logits(model)
    adapter = moved(svdpeft.attach(model, method, ["q_proj"]))
    tuned = logits(model)
    for save, folder in (
        (model.save_pretrained, tmp_path / "one"),
        (transformers.Trainer(model, arguments(tmp_path)).save_model, tmp_path / "two"),
    ):
        save(str(folder))
        assert sorted(p.name for p in folder.iterdir() if p.suffix != ".bin") == ["README.md", "adapter"]
        for cls in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
            with pytest.raises((OSError, ValueError), match=r"config\.json|no file named model"):
                cls.from_pretrained(folder)
        fresh = Llama()
        svdpeft.load(fresh, folder)
        assert torch.equal(logits(fresh), tuned)
    (tmp_path / "one" / "README.md").write_text("my own words")
    model.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "README.md").read_text() == "my own words"
    with pytest.raises(ValueError, match="the hub would get the base without it"):
        model.save_pretrained(tmp_path / "one", push_to_hub=True)

    with adapter.disabled():
        model.save_pretrained(tmp_path / "base")
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")), base)
    adapter.merge()
    merged = logits(model)
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), merged)
    adapter.merge(permanent=True) if adapter.state == "attached" else adapter.unmerge()
    adapter.detach()
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path / "after")
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "after")), base)


def test_several_adapters_have_a_folder_each(tmp_path: Path):
    model = Llama()
    first = moved(svdpeft.attach(model, LoRA(rank=1), ["q_proj"], name="first"))
    second = moved(svdpeft.attach(model, LoRA(rank=2), ["v_proj"], name="second"))
    tuned = logits(model)
    model.save_pretrained(tmp_path / "both")
    fresh = Llama()
    svdpeft.load(fresh, tmp_path / "both" / "adapter-first")
    svdpeft.load(fresh, tmp_path / "both" / "adapter-second")
    assert torch.equal(logits(fresh), tuned)
    first.merge()
    with pytest.raises(ValueError, match="'second' acts and another is merged or disabled"):
        model.save_pretrained(tmp_path / "half")
    second.merge(permanent=True)
    first.unmerge()
    first.merge(permanent=True)
    torch.testing.assert_close(logits(model), tuned)
    assert "save_pretrained" not in vars(model)


def test_a_copy_saves_its_own(tmp_path: Path):
    import copy

    model = Llama()
    moved(svdpeft.attach(model, LoRA(rank=1), ["q_proj"]))
    twin = copy.deepcopy(model)
    moved(twin._svdpeft.adapters["default"])
    twin.save_pretrained(tmp_path)
    fresh = Llama()
    svdpeft.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(twin))
    assert not torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("state", ["attached", "merged", "folded"])
def test_the_state_dict_of_the_merged_model(state: str):
    model = make(WithLoss)
    names = list(model.state_dict())
    adapter = moved(svdpeft.attach(model, PiSSA(rank=2), ["body"], train=["head"]))
    x = torch.randn(3, 6)
    if state != "attached":
        {"merged": adapter.merge, "folded": adapter.fold}[state]()
    out = model.eval()(x).logits
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = adapter.merged_state_dict()
    assert adapter.state == state
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert list(found) == names
    plain = make(WithLoss)
    plain.load_state_dict(found)  # strict
    torch.testing.assert_close(plain.eval()(x).logits, out)
    assert F.cross_entropy(plain(x).logits, torch.tensor([0, 1, 2])).isfinite()
    with adapter.disabled(), pytest.raises(RuntimeError, match="is disabled"):
        adapter.merged_state_dict()
