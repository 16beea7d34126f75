"""The trainer: loss, regulariser, learning rates per role, checkpoints, resume; and the callback for a stock one."""

import json

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import svdpeft
from svdpeft.adapter.file import CheckpointError
from svdpeft.decomposition.orthonormality import orthonormality_gradient
from svdpeft.training.callback import StepCallback


class Bare(nn.Module):
    """Like timm's models: takes ``x``, returns logits."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.body(x))))


class WithLoss(Bare):
    """Like transformers' models: takes ``labels``, returns a loss."""

    def forward(self, x, labels=None):
        logits = super().forward(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


# every step is judged and saved, and the best is brought back
KEEP_BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
}


def make(cls=Bare):
    torch.manual_seed(0)
    return cls()


def data(count=24):
    g = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(6, generator=g), "labels": torch.tensor(i % 3)} for i in range(count)]


def collate(examples):
    return {key: torch.stack([e[key] for e in examples]) for key in examples[0]}


def arguments(folder, **options):
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(str(folder), **{**defaults, **options})


def trainer(model, adapter, args, cls=svdpeft.Trainer, **options):
    own = {"adapter": adapter} if issubclass(cls, svdpeft.Trainer) else {}
    options.setdefault("train_dataset", data())
    return cls(model=model, args=args, data_collator=collate, **own, **options)


def values(adapter):
    return {name: p.detach().clone() for name, p in adapter.named_parameters()}


@pytest.mark.parametrize("cls", [Bare, WithLoss])
def test_one_step_of_sgd_is_the_hand_written_one(cls, tmp_path):
    batch = collate(data()[:4])
    model = make(cls)
    adapter = svdpeft.attach(model, svdpeft.SORSA(rank=2, gamma=0), ["body"], train=["head"])
    model.train()
    out = model(batch["x"])
    F.cross_entropy(out if cls is Bare else out.logits, batch["labels"]).backward()
    expected = {name: (p - 0.1 * p.grad).detach() for name, p in adapter.named_parameters()}
    adapter.detach()

    adapter = svdpeft.attach(make(cls), svdpeft.SORSA(rank=2, gamma=0), ["body"], train=["head"])
    args = arguments(tmp_path, max_steps=1, optim="sgd", learning_rate=0.1, max_grad_norm=0.0)
    trainer(adapter.model, adapter, args, train_dataset=data()[:4]).train()
    for name, value in values(adapter).items():
        torch.testing.assert_close(value, expected[name])


def test_only_the_trained_parameters_move(tmp_path):
    model = make()
    adapter = svdpeft.attach(model, svdpeft.PiSSA(rank=2), ["body"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer(model, adapter, arguments(tmp_path)).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"body.svdpeft.default:weight.L", "body.svdpeft.default:weight.A"}


def test_the_decoupled_regulariser_acts_after_each_step_and_follows_the_schedule(tmp_path):
    """With a learning rate of zero for the bases' own gradients, only γ_t · ∂L_reg moves them."""
    model = make()
    adapter = svdpeft.attach(model, svdpeft.SORSA(rank=2, gamma=1e-2), ["body"])
    factors = adapter.site("body").factors
    with torch.no_grad():
        factors.L.mul_(1.5)
    expected = factors.L.detach().clone()
    run = trainer(
        model,
        adapter,
        arguments(tmp_path, max_steps=3, optim="sgd", lr_scheduler_type="linear", max_grad_norm=0.0),
        role_lr={"L": 0.0, "A": 0.0},
    )
    run.train()
    for step in range(3):
        expected = expected - 1e-2 * (3 - step) / 3 * orthonormality_gradient(expected)  # linear decay from the peak
    torch.testing.assert_close(factors.L.detach(), expected)


def test_the_regulariser_does_not_depend_on_gradient_accumulation(tmp_path):
    def bases(mode, batch, accumulation):
        model = make()
        model.norm.eval()
        adapter = svdpeft.attach(model, svdpeft.SORSA(rank=2, gamma=0.05, mode=mode), ["body"])
        with torch.no_grad():
            adapter.site("body").factors.L.mul_(1.2)
        model.norm.requires_grad_(False)
        model.norm = nn.Identity()  # batch statistics would depend on how the batch is cut
        args = arguments(
            tmp_path, optim="sgd", per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
        )
        trainer(model, adapter, args).train()
        return values(adapter)

    for mode in ("decoupled", "gradient", "loss"):
        whole, parts = bases(mode, 4, 1), bases(mode, 2, 2)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6, msg=f"{mode} {name}")


class Normalised(Bare):
    """Like a causal language model: its loss is the sum over the micro-batch by the count of the whole batch."""

    def forward(self, x, labels, **kwargs):
        logits = super().forward(x)
        loss = F.cross_entropy(logits, labels, reduction="sum") / kwargs["num_items_in_batch"]
        return transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


def test_the_penalty_counts_once_where_the_model_normalises_its_own_loss(tmp_path):
    def bases(batch, accumulation):
        model = make(Normalised)
        model.norm = nn.Identity()
        adapter = svdpeft.attach(model, svdpeft.SORSA(rank=2, gamma=0.05, mode="loss"), ["body"])
        with torch.no_grad():
            adapter.site("body").factors.L.mul_(1.2)
        args = arguments(
            tmp_path, optim="sgd", per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
        )
        trainer(model, adapter, args).train()
        return values(adapter)

    whole, parts = bases(4, 1), bases(2, 2)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_that_the_optimizer_skipped_is_none(tmp_path):
    adapter = svdpeft.attach(make(), svdpeft.SORSA(rank=2, gamma=0.1), ["body"])
    with torch.no_grad():
        adapter.site("body").factors.L.mul_(1.2)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    callback, state = StepCallback(adapter), transformers.TrainerState(max_steps=4)
    for skipped in (True, False):
        optimizer.step_was_skipped = skipped  # as accelerate says it of an overflow in float16
        before = values(adapter)
        callback.on_optimizer_step(arguments(tmp_path), state, transformers.TrainerControl(), optimizer=optimizer)
        assert torch.equal(before["body/L"], values(adapter)["body/L"]) == skipped
        assert adapter.steps == (0 if skipped else 1)


def test_each_mode_of_the_regulariser_pulls_the_bases_back(tmp_path):
    def error(**options):
        model = make()
        adapter = svdpeft.attach(model, svdpeft.SORSA(rank=2, **options), ["body"])
        with torch.no_grad():
            adapter.site("body").factors.L.mul_(1.5)
        args = arguments(tmp_path, optim="sgd", max_steps=10, lr_scheduler_type="constant", max_grad_norm=0.0)
        trainer(model, adapter, args).train()
        q = adapter.site("body").factors.L.detach()
        return torch.linalg.matrix_norm(q.mT @ q - torch.eye(2)).item()

    free = error(gamma=0)
    assert error(gamma=0.05) < 0.8 * free
    assert error(gamma=0.05, mode="gradient") < 0.95 * free  # a mean over two factors: half as strong
    assert error(gamma=5, mode="loss") < 0.8 * free
    assert error(mode="retract") < 1e-5


def test_a_learning_rate_per_role(tmp_path):
    model = make()
    adapter = svdpeft.attach(model, svdpeft.SORSA(rank=2), ["body"], train=["head"])
    run = trainer(model, adapter, arguments(tmp_path, weight_decay=0.1), role_lr={"C": 0.5, "whole": 0.25})
    groups = run.create_optimizer().param_groups
    found = {(id(p), group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    factors = adapter.site("body").factors
    assert (id(factors.C), 0.5, 0.1) in found
    assert (id(factors.L), 1e-2, 0.1) in found
    assert (id(model.head.weight), 0.25, 0.1) in found
    assert (id(model.head.bias), 0.25, 0.0) in found
    assert len(found) == len(list(adapter.parameters()))
    with pytest.raises(ValueError, match="did you mean 'whole'"):
        trainer(model, adapter, arguments(tmp_path), role_lr={"whoel": 1.0})


@pytest.mark.parametrize("method", [svdpeft.SORSA(rank=2, dropout=0.3), svdpeft.Full()])
def test_a_resumed_run_ends_at_the_same_bits(method, tmp_path):
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    model = make()
    adapter = svdpeft.attach(model, method, ["body"], train=["head"])
    trainer(model, adapter, arguments(tmp_path, **args)).train()
    through, statistics = values(adapter), model.norm.running_mean.clone()
    checkpoint = tmp_path / "checkpoint-3"
    assert not list(checkpoint.glob("model*")), "the checkpoint holds the adapter, not the model"

    torch.manual_seed(99)
    model = make()
    adapter = svdpeft.attach(model, method, ["body"], train=["head"], seed=5)
    trainer(model, adapter, arguments(tmp_path, **args)).train(resume_from_checkpoint=str(checkpoint))
    for name, value in values(adapter).items():
        assert torch.equal(value, through[name]), name
    assert torch.equal(model.norm.running_mean, statistics)

    fresh = make()
    if method.factored:
        loaded = svdpeft.load(fresh, tmp_path / "checkpoint-6" / "adapter")
        x = data()[0]["x"][None]
        assert torch.equal(fresh.eval()(x), model.eval()(x))
        loaded.detach()


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    model = make()
    adapter = svdpeft.attach(model, svdpeft.SORSA(rank=2), ["body"])
    trainer(model, adapter, arguments(tmp_path, save_strategy="steps", save_steps=2)).train()
    adapter.detach()
    adapter = svdpeft.attach(model, svdpeft.SORSA(rank=3), ["body"])
    before = values(adapter)
    with pytest.raises(CheckpointError, match="another method at body: rank differs"):
        trainer(model, adapter, arguments(tmp_path)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in values(adapter).items():
        assert torch.equal(value, before[name])


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model = make()
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=2), ["body"])
    args = arguments(
        tmp_path,
        **KEEP_BEST,
        learning_rate=30.0,  # diverges, so that the best is not the last
        optim="sgd",
    )
    run = trainer(model, adapter, args, eval_dataset=data(8))
    run.train()
    best = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(best), rel=1e-5)


def test_the_log_has_count_time_and_memory(tmp_path):
    model = make()
    adapter = svdpeft.attach(model, svdpeft.SORSA(rank=2), ["body"])
    run = trainer(model, adapter, arguments(tmp_path))
    run.train()
    first = run.state.log_history[0]
    assert first["trainable"] == 2 * (6 + 8 + 1)
    assert 0 < first["step_time"] < 60
    assert 10 < first["peak_memory_mib"] < 1e6


def test_a_transformers_that_would_save_whole_models_is_refused(tmp_path, monkeypatch):
    model = make()
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=2), targets=["body"])
    monkeypatch.delattr(transformers.Trainer, "_load_best_model")
    with pytest.raises(RuntimeError, match=r"has no Trainer\._load_best_model"):
        trainer(model, adapter, arguments(tmp_path))


def test_an_empty_data_set_is_named(tmp_path):
    model = make()
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=2), ["body"])
    with pytest.raises(ValueError, match="train_dataset is empty"):
        trainer(model, adapter, arguments(tmp_path), train_dataset=[])


@pytest.mark.parametrize("mode", ["decoupled", "gradient", "loss", "retract"])
def test_the_callback_makes_a_stock_trainer_do_the_same(mode, tmp_path):
    method = svdpeft.SORSA(rank=2, gamma=0.05, mode=mode)
    args = {"save_strategy": "steps", "save_steps": 4}

    def run(cls, **options):
        model = make(WithLoss)
        adapter = svdpeft.attach(model, method, ["body"], train=["head"])
        callbacks = [] if cls is svdpeft.Trainer else [svdpeft.AdapterCallback(adapter)]
        trainer(model, adapter, arguments(tmp_path / cls.__module__, **args), cls, callbacks=callbacks).train()
        return adapter

    ours, stock = run(svdpeft.Trainer), run(transformers.Trainer)
    for name, value in values(ours).items():
        assert torch.equal(value, values(stock)[name]), name
    assert not stock.model._forward_hooks
    folder = tmp_path / transformers.Trainer.__module__ / "checkpoint-4" / "adapter"
    assert json.loads((folder / "adapter.json").read_text())["name"] == "default"
    loaded = svdpeft.load(make(WithLoss), folder)
    for name, value in values(loaded).items():
        assert torch.equal(value, values(stock)[name]), name


@pytest.mark.parametrize("stacked", [False, True])
def test_pairs_as_torchvision_gives_them_need_no_collator(tmp_path, stacked):
    """An ImageFolder, say: (picture, class). A model that is called by another name than ``x``, too."""

    class Other(Bare):
        def forward(self, pixels):
            return super().forward(pixels)

    pairs = [(row["x"] if stacked else row["x"].tolist(), int(row["labels"])) for row in data()]
    found = []
    for cls, rows in ((Bare, None), (Bare, pairs), (Other, pairs)):
        adapter = svdpeft.attach(make(cls), svdpeft.LoRA(rank=2), ["body"])
        options = {} if rows is None else {"train_dataset": rows}
        own = {"train_dataset": data(), "data_collator": collate} if rows is None else options
        run = svdpeft.Trainer(
            model=adapter.model, adapter=adapter, args=arguments(tmp_path), eval_dataset=own["train_dataset"], **own
        )
        run.train()
        found.append((values(adapter), run.evaluate()["eval_loss"]))
    for other, loss in found[1:]:
        assert loss == found[0][1]
        assert all(torch.equal(other[name], value) for name, value in found[0][0].items())
