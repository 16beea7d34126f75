"""Every kind of model that the stock ``transformers.Trainer`` trains, with ours beside it: the same losses and outputs.

A bare model, that returns a tensor, is one that the stock trainer does not judge rightly: it is held to a loop by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from rows import EVERYTHING
from test_trainer import Bare, WithLoss, arguments, values
from torch import Tensor, nn
from torch.nn import functional as F

import svdpeft
from svdpeft import LoRA
from svdpeft.training.trainer import returns_loss

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30}
COUNT = 9  # the last batch has one row
G = torch.Generator()


def randint(high: int, *shape: int) -> Tensor:
    return torch.randint(1, high, shape, generator=G)


def rows(**fields: Callable[[], Any]) -> list[dict[str, Any]]:
    G.manual_seed(3)
    return [{name: make() for name, make in fields.items()} for _ in range(COUNT)]


def stack(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Batches of tensors; what is the same for all rows goes along."""
    first = examples[0]
    return {k: torch.stack([e[k] for e in examples]) if isinstance(first[k], Tensor) else first[k] for k in first}


class Names(Bare):
    """Labels by another name, and a loss first in a tuple."""

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        logits = super().forward(x)
        return (logits,) if target is None else (F.cross_entropy(logits, target), logits)


class AsDict(Bare):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = super().forward(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def classified(cls: type[nn.Module], labels: str = "labels") -> tuple[Any, ...]:
    return cls, rows(x=lambda: torch.randn(6, generator=G), **{labels: lambda: randint(3, 1)[0]}), ["body"]


def masked() -> tuple[Any, ...]:
    config = transformers.BertConfig(**SMALL, num_labels=3)
    data = rows(input_ids=lambda: randint(30, 7), labels=lambda: randint(3, 1)[0])
    return lambda: transformers.BertForSequenceClassification(config), data, ["query", "value"]


def answers() -> tuple[Any, ...]:
    data = rows(
        input_ids=lambda: randint(30, 7),
        start_positions=lambda: randint(7, 1)[0],
        end_positions=lambda: randint(7, 1)[0],
    )
    return lambda: transformers.BertForQuestionAnswering(transformers.BertConfig(**SMALL)), data, ["query"]


def clip() -> tuple[Any, ...]:
    text = {**SMALL, "max_position_embeddings": 8, "eos_token_id": 29, "projection_dim": 8}
    image = {k: v for k, v in SMALL.items() if k != "vocab_size"} | {
        "image_size": 8,
        "patch_size": 4,
        "projection_dim": 8,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=8)
    data = rows(
        input_ids=lambda: randint(30, 7),
        pixel_values=lambda: torch.randn(3, 8, 8, generator=G),
        return_loss=lambda: True,
    )
    return lambda: transformers.CLIPModel(config), data, ["q_proj"]


def ctc() -> tuple[Any, ...]:
    config = transformers.Wav2Vec2Config(
        **{**SMALL, "vocab_size": 9},
        conv_dim=(8, 8),
        conv_stride=(3, 2),
        conv_kernel=(5, 3),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
    )
    data = rows(input_values=lambda: torch.randn(90, generator=G), labels=lambda: randint(8, 4))
    return lambda: transformers.Wav2Vec2ForCTC(config), data, ["q_proj"]


def seq2seq() -> tuple[Any, ...]:
    config = transformers.T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    data = rows(input_ids=lambda: randint(30, 7), labels=lambda: randint(30, 5))
    return lambda: transformers.T5ForConditionalGeneration(config), data, ["q", "v"]


def causal() -> tuple[Any, ...]:
    config = transformers.LlamaConfig(**SMALL)
    data = rows(input_ids=lambda: randint(30, 7))
    for row in data:
        row["labels"] = row["input_ids"]
    return lambda: transformers.LlamaForCausalLM(config), data, ["q_proj", "down_proj"]


CASES: dict[str, tuple[Callable[[], tuple[Any, ...]], dict[str, Any]]] = {
    "dict": (lambda: classified(AsDict), {}),
    "output": (lambda: classified(WithLoss), {}),
    "label names": (lambda: classified(Names, "target"), {"label_names": ["target"]}),
    "sequence classification": (masked, {}),
    "question answering": (answers, {}),
    "clip": (clip, {}),
    "ctc": (ctc, {}),
    "seq2seq": (seq2seq, {}),
    "causal": (causal, {}),
    "smoothing": (masked, {"label_smoothing_factor": 0.1}),
    "smoothing causal": (causal, {"label_smoothing_factor": 0.1}),
    "accumulation": (causal, {"gradient_accumulation_steps": 2}),
    "accumulation of means": (lambda: classified(WithLoss), {"gradient_accumulation_steps": 2}),
}


def build(make: Callable[[], nn.Module], targets: list[str]) -> Any:
    torch.manual_seed(0)
    model = make().eval()
    if isinstance(model, Bare):
        model.norm = nn.Identity()  # it does not train on the one row of the last batch
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return svdpeft.attach(model, LoRA(rank=2), targets)


def life(adapter: Any, data: Any, folder: Any, stock: bool, wrap: Any = None, **options: Any) -> dict[str, Any]:
    """Train, evaluate and predict: what came out."""
    more = {name: options.pop(name) for name in ("compute_loss_func",) if name in options}
    args = arguments(folder, num_train_epochs=2, max_steps=-1, per_device_eval_batch_size=4, **options)
    cls = transformers.Trainer if stock else svdpeft.Trainer
    own = {"callbacks": [svdpeft.AdapterCallback(adapter)]} if stock else {"adapter": adapter}
    model = adapter.model if wrap is None else wrap(adapter.model)
    run = cls(model=model, args=args, train_dataset=data, eval_dataset=data, data_collator=stack, **own, **more)
    run.train()
    labels = run.label_names
    bare = [{k: v for k, v in row.items() if k not in (*labels, "return_loss")} for row in data]
    found = {"losses": [entry["loss"] for entry in run.state.log_history if "loss" in entry], "values": values(adapter)}
    found["eval_loss"] = run.evaluate().get("eval_loss")
    judged = run.predict(data)
    found["predictions"], found["label_ids"] = judged.predictions, judged.label_ids
    if "input_ids" not in bare[0] or not isinstance(adapter.model, transformers.T5ForConditionalGeneration):
        found["bare"] = run.predict(bare).predictions
    return found


def same(ours: Any, theirs: Any, what: str) -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), what
        for key in theirs:
            same(ours[key], theirs[key], f"{what}: {key}")
    elif isinstance(theirs, tuple | list):
        assert len(ours) == len(theirs), what
        for i, each in enumerate(theirs):
            same(ours[i], each, f"{what}[{i}]")
    elif theirs is None or isinstance(theirs, float):
        assert ours == theirs, what
    else:
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=what)


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_as_the_stock_trainer(case: str, tmp_path: Any):
    make, options = CASES[case]
    found = {}
    for stock in (True, False):
        model, data, targets = make()
        found[stock] = life(build(model, targets), data, tmp_path / str(stock), stock, **options)
    assert len(found[True]["losses"]) > 1
    assert found[True]["eval_loss"] is not None
    same(found[False], found[True], case)


@pytest.mark.parametrize("case", ["output", "question answering", *(["causal"] if EVERYTHING else [])])
def test_a_compiled_model_is_the_model(case: str, tmp_path: Any):
    make, options = CASES[case]
    found = {}
    for wrap in (None, lambda m: torch.compile(m, backend="eager")):
        model, data, targets = make()
        found[wrap is None] = life(build(model, targets), data, tmp_path, False, wrap, **options)
    assert found[False]["eval_loss"] == pytest.approx(found[True]["eval_loss"], rel=1e-5)
    for name, value in found[True]["values"].items():
        torch.testing.assert_close(found[False]["values"][name], value, msg=name)


# -- bare models -----------------------------------------------------------------------------------------------------


def mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs, labels)


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 9, 16])
@pytest.mark.parametrize("func", [None, mean], ids=["own loss", "loss function"])
@pytest.mark.parametrize("wrap", [None, lambda m: torch.compile(m, backend="eager")], ids=["eager", "compiled"])
def test_a_bare_model_is_judged_exactly_for_any_size_of_batch(func: Any, batch: int, wrap: Any, tmp_path: Any):
    model, data, targets = classified(Bare)
    adapter = build(model, targets)
    args = arguments(tmp_path, per_device_eval_batch_size=batch)
    run = svdpeft.Trainer(
        model=adapter.model if wrap is None else wrap(adapter.model),
        adapter=adapter,
        args=args,
        eval_dataset=data,
        data_collator=stack,
        compute_loss_func=func,
        compute_metrics=lambda p: {
            "rows": len(p.predictions),
            "right": int((p.predictions.argmax(-1) == p.label_ids).sum()),
        },
    )
    x, labels = torch.stack([row["x"] for row in data]), torch.stack([row["labels"] for row in data])
    with torch.no_grad():
        logits = adapter.model(x)
    found = run.evaluate()
    assert found["eval_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["eval_rows"] == COUNT
    assert found["eval_right"] == int((logits.argmax(-1) == labels).sum())
    for rows_of in (data, [{"x": row["x"]} for row in data]):
        np.testing.assert_allclose(run.predict(rows_of).predictions, logits.numpy(), rtol=1e-5, atol=1e-6)


def test_a_bare_model_trains_with_labels_of_another_name(tmp_path: Any):
    found = []
    for name, options in (("labels", {}), ("target", {"label_names": ["target"]})):
        model, data, targets = classified(Bare, name)
        found.append(life(build(model, targets), data, tmp_path, False, **options))
    same(found[0], found[1], "names")


@pytest.mark.parametrize(
    ("rows_of", "options", "words"),
    [
        ({"x": torch.randn(6), "y": torch.tensor(1)}, {}, r"the batch has no 'labels', but 'x', 'y': name what holds"),
        ({"x": torch.randn(6), "a": 1, "b": 2}, {"label_names": ["a", "b"]}, "here are 2 labels: give"),
    ],
)
def test_a_bare_model_without_its_labels_is_told_so(rows_of: Any, options: Any, words: str, tmp_path: Any):
    adapter = build(Bare, ["body"])
    args = arguments(tmp_path, **options)
    run = svdpeft.Trainer(
        model=adapter.model, adapter=adapter, args=args, train_dataset=[rows_of] * 4, data_collator=stack
    )
    with pytest.raises(ValueError, match=words):
        run.train()


class Two(Bare):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def test_a_bare_model_of_several_outputs_wants_a_loss_function(tmp_path: Any):
    model, data, targets = classified(Two)
    adapter = build(model, targets)
    args = arguments(tmp_path)
    run = svdpeft.Trainer(model=adapter.model, adapter=adapter, args=args, train_dataset=data, data_collator=stack)
    with pytest.raises(ValueError, match="here are a tuple and no loss: give the trainer a compute_loss_func"):
        run.train()


def test_which_models_have_a_loss():
    assert not returns_loss(Bare())
    assert not returns_loss(torch.compile(Bare(), backend="eager"))
    assert not returns_loss(Bare(), ["target"])
    assert returns_loss(torch.compile(WithLoss(), backend="eager"))
    assert returns_loss(Names(), ["target"])
    for make in (answers, clip, ctc, seq2seq):
        assert returns_loss(make()[0]())
