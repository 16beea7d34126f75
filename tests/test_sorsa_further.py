"""SORSA taken further: a strength that changes, early stopping, dropout, and hybrids. To be read as examples."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from helpers import equal_bits, perturb
from rows import covering
from test_trainer import KEEP_BEST, WithLoss, arguments, data, make, trainer, values
from torch import nn

import svdpeft
from svdpeft import SORSA, Adaptive, LoRA, Schedule, attach
from svdpeft.decomposition.orthonormality import orthonormality_error, orthonormality_gradient
from svdpeft.methods.base.bases import errors
from svdpeft.sites.weights import stored
from svdpeft.training.callback import StepCallback


def regression() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A small net, and what it is to learn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(64, 12)
    return model, x, 2 * torch.tanh(x @ torch.randn(12, 4))


def mean_error(adapter) -> float:
    """The mean of ‖QᵀQ − I‖_F over all bases."""
    with torch.no_grad():
        return float(errors([site.factors for site in adapter.sites.values()]).mean())


def train(model, adapter, x, y, steps=300, lr=1e-2):
    """A training loop by hand; returns the mean orthonormality error after each step."""
    optimizer = torch.optim.AdamW(list(adapter.parameters()), lr=lr, weight_decay=0.0)
    generator, seen = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        batch = torch.randint(len(x), (16,), generator=generator)
        loss = (model(x[batch]) - y[batch]).square().mean()
        penalty = adapter.penalty()
        (loss if penalty is None else loss + penalty).backward()
        adapter.before_step(peak_lr=lr, total_steps=steps)
        optimizer.step()
        adapter.after_step()
        optimizer.zero_grad()
        seen.append(mean_error(adapter))
    return seen


# -- γ -----------------------------------------------------------------------------------------------------------


STARTS = [(target, off) for target in (0.1, 0.3) for off in (1.0, 1.3)]  # from below, and from above


@pytest.mark.parametrize(("mode", "start"), covering(["decoupled", "gradient", "loss"], STARTS), ids=str)
def test_an_adaptive_gamma_holds_the_mean_error_at_its_target(mode: str, start: tuple[float, float]):
    """Over the last 50 of 300 steps: within 25 % of the target in the mean, and never off by more than 60 %."""
    (target, off), (model, x, y) = start, regression()
    adapter = svdpeft.attach(model, SORSA(rank=4, gamma=Adaptive(target), mode=mode))
    with torch.no_grad():
        for site in adapter.sites.values():
            site.factors.L.mul_(off)  # 1.3: ‖(1.69 − 1) I₄‖_F = 1.38 for every L, and so 0.69 in the mean
    assert (mean_error(adapter) > target) == (off > 1)
    last = train(model, adapter, x, y)[-50:]
    assert sum(last) / len(last) == pytest.approx(target, rel=0.25)
    assert max(last) < 1.6 * target
    assert min(last) > target / 1.6


def test_the_same_training_is_far_from_both_targets_with_a_fixed_gamma():
    model, x, y = regression()
    found = train(model, svdpeft.attach(model, SORSA(rank=4, gamma=4e-4)), x, y)[-1]
    assert found > 1.0


def test_an_adaptive_step_never_leads_past_the_nearest_orthonormal_basis():
    model, _, _ = regression()
    adapter = svdpeft.attach(model, SORSA(rank=4, gamma=Adaptive(1e-3, start=1.0)))
    site = adapter.sites["0"].factors
    with torch.no_grad():
        site.L.mul_(1.1)
    q = site.L.detach().clone()
    adapter.after_step()
    torch.testing.assert_close(site.L.detach(), q @ (3 * torch.eye(4) - q.mT @ q) / 2)  # Newton and Schulz


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_schedule_gives_each_step_its_gamma(shape: str):
    torch.manual_seed(0)
    schedule, total = Schedule(0.02, 0.004, shape), 5
    adapter = svdpeft.attach(nn.Sequential(nn.Linear(6, 9)).double(), SORSA(rank=3, gamma=schedule))
    q = adapter.sites["0"].factors.L
    with torch.no_grad():
        q.mul_(1.2)
    expected = q.detach().clone()
    for step in range(1, total + 1):
        share = (step - 1) / (total - 1)
        if shape == "cosine":
            share = 0.5 - 0.5 * torch.cos(torch.tensor(torch.pi * share, dtype=torch.float64))
        expected = expected - 0.5 * (0.02 - 0.016 * share) * orthonormality_gradient(expected)
        adapter.before_step(1e-3, total)
        adapter.after_step(lr_scale=0.5)
        torch.testing.assert_close(q.detach(), expected)


def test_a_constant_schedule_is_the_number_and_the_number_is_unchanged(tmp_path):
    def run(gamma, mode):
        model = make(WithLoss)
        adapter = svdpeft.attach(model, SORSA(rank=2, gamma=gamma, mode=mode), ["body"])
        trainer(model, adapter, arguments(tmp_path)).train()
        return values(adapter)

    for mode in ("decoupled", "gradient", "loss"):
        number, schedule = run(0.05, mode), run(Schedule(0.05, 0.05), mode)
        for name, value in number.items():
            torch.testing.assert_close(schedule[name], value)
    assert not SORSA(gamma=0.05).keeps_state, "a number needs nothing to be remembered"


def test_a_schedule_needs_to_know_its_length():
    model, _, _ = regression()
    adapter = svdpeft.attach(model, SORSA(rank=2, gamma=Schedule(0.1)))
    with pytest.raises(RuntimeError, match="needs the number of optimizer steps"):
        adapter.after_step()


@pytest.mark.parametrize(
    "gamma", [4e-4, 0, Schedule(0.1, 0.01, "cosine"), Adaptive(0.1, start=1e-3, high=0.5)], ids=str
)
def test_a_gamma_goes_through_json(gamma):
    fields = json.loads(json.dumps(SORSA(gamma=gamma).to_json()))
    assert svdpeft.method(fields.pop("name"))(**fields) == SORSA(gamma=gamma)


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda: SORSA(gamma={"target": 0.0}), "target 0.0 is not positive; mode='retract'"),
        (lambda: SORSA(gamma={"target": 0.1, "start": 2.0}), r"start 2.0 is outside \[1e-08, 1.0\]"),
        (lambda: SORSA(gamma={"start": -0.1}), "start -0.1 is negative"),
        (lambda: SORSA(gamma={"start": 0.1, "shape": "step"}), "shape 'step' is neither"),
        (lambda: SORSA(gamma={"begin": 0.1}), "begin"),
        (lambda: SORSA(gamma=Adaptive(0.1), mode="retract"), "mode 'retract' has no γ"),
    ],
)
def test_a_bad_gamma_is_named(make_it, words: str):
    with pytest.raises(ValueError, match=words):
        make_it()


# -- as usual: early stopping and dropout --------------------------------------------------------------------------


def test_early_stopping_ends_the_training_and_brings_the_best_adapter_back(tmp_path):
    model = make(WithLoss)
    adapter = svdpeft.attach(model, SORSA(rank=2, gamma=Adaptive(0.05)), ["body"], train=["head"])
    args = arguments(
        tmp_path,
        max_steps=50,
        **KEEP_BEST,
        learning_rate=3.0,  # diverges, so that the best is not the last
        optim="sgd",
    )
    stop = transformers.EarlyStoppingCallback(early_stopping_patience=3)
    run = trainer(model, adapter, args, eval_dataset=data(8), callbacks=[stop])
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(losses) < 50, "stopped early"
    best = losses.index(min(losses)) + 1
    assert best < len(losses)
    saved = svdpeft.load(make(WithLoss), tmp_path / f"checkpoint-{best}" / "adapter")
    for name, value in values(saved).items():
        assert torch.equal(value, values(adapter)[name]), name


def test_dropout_acts_on_the_adapters_input_in_training_alone():
    model, x, _ = regression()
    base = model(x).detach()
    adapter = svdpeft.attach(model, SORSA(rank=4, dropout=0.5))
    assert torch.equal(model.train()(x), base), "the start is exact with dropout, too"
    with torch.no_grad():
        adapter.sites["0"].factors.C.mul_(1.5)
    torch.manual_seed(1)
    noisy = model(x)
    kept = (torch.manual_seed(1), nn.functional.dropout(torch.ones_like(x), 0.5))[1]
    hidden = nn.functional.linear(x, stored(model[0], "weight"), model[0].bias)
    hidden = hidden + (kept * x) @ adapter.delta("0").mT
    adapter.sites["2"].active = False
    torch.testing.assert_close(noisy, model[2](torch.tanh(hidden)))
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model(x), noisy)


# -- hybrids -------------------------------------------------------------------------------------------------------


def test_in_sequence_first_sorsa_then_lora():
    model, x, y = regression()
    first = svdpeft.attach(model, SORSA(rank=4))
    train(model, first, x, y, steps=5)
    learned = model(x).detach()
    deltas = {name: first.delta(name) for name in first.sites}
    weights = {name: stored(model[int(name)], "weight").clone() for name in deltas}

    first.merge(permanent=True)  # a plain model again, with W0 + ΔW for weights
    for name, delta in deltas.items():
        assert equal_bits(model[int(name)].weight.detach(), weights[name] + delta)
    torch.testing.assert_close(model(x), learned)
    merged = model(x).detach()

    second = svdpeft.attach(model, LoRA(rank=2))
    assert torch.equal(model(x), merged), "the second starts exactly where the first has ended"
    train(model, second, x, y, steps=5)
    assert not torch.equal(model(x), merged)
    with second.disabled():
        assert torch.equal(model(x), merged)


def both_adapters(model) -> tuple:
    one = svdpeft.attach(model, SORSA(rank=4, mode="loss", gamma=0.01), name="one")
    return one, svdpeft.attach(model, LoRA(rank=2), name="two")


def test_side_by_side_by_hand():
    """Two adapters, one optimizer: both penalties in the loss, both steps around the optimizer's."""
    model, x, y = regression()
    base = model(x).detach()
    pair = both_adapters(model)
    assert torch.equal(model(x), base)
    before = [values(adapter) for adapter in pair]
    optimizer = torch.optim.SGD([p for adapter in pair for p in adapter.parameters()], lr=0.05)
    for step in range(4):
        loss = (model(x) - y).square().mean()
        penalties = [penalty for adapter in pair if (penalty := adapter.penalty()) is not None]
        torch.stack([loss, *penalties]).sum().backward()
        for adapter in pair:
            adapter.before_step(peak_lr=0.05, total_steps=4)
        if step == 0:  # what the update is made of, exactly
            expected = [{n: (p - 0.05 * p.grad).detach() for n, p in a.named_parameters()} for a in pair]
        optimizer.step()
        for adapter in pair:
            adapter.after_step()
        if step == 0:
            for adapter, wanted in zip(pair, expected, strict=True):
                for name, p in adapter.named_parameters():
                    torch.testing.assert_close(p.detach(), wanted[name], rtol=1e-6, atol=1e-7)
        optimizer.zero_grad()
    for adapter, start in zip(pair, before, strict=True):
        assert all(not torch.equal(p, start[name]) for name, p in adapter.named_parameters())

    layer, together = model[0], pair[0].delta("0") + pair[1].delta("0")
    weight = stored(layer, "weight")
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight + together, layer.bias))
    with pair[0].disabled(), pair[1].disabled():
        assert torch.equal(model(x), base)


def test_side_by_side_with_the_trainer(tmp_path):
    """The Trainer has one adapter, a callback the other; both end where the loop by hand does."""

    def run(by_trainer: bool):
        model = make(WithLoss)
        model.norm = nn.Identity()
        one = svdpeft.attach(model, SORSA(rank=2, gamma=0.05), ["body"], name="one")
        two = svdpeft.attach(model, SORSA(rank=1, gamma=0.02), ["head"], name="two")
        if by_trainer:
            args = arguments(tmp_path, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant")
            own = trainer(model, one, args, train_dataset=data(4), callbacks=[StepCallback(two)])
            own.train()
        else:
            batch = {key: torch.stack([e[key] for e in data(4)]) for key in data(4)[0]}
            optimizer = torch.optim.SGD([*one.parameters(), *two.parameters()], lr=1e-2)
            for _ in range(4):
                model(**batch).loss.backward()
                one.before_step(1e-2)
                two.before_step(1e-2)
                optimizer.step()
                one.after_step()
                two.after_step()
                optimizer.zero_grad()
        return values(one) | values(two)

    by_hand, by_trainer = run(False), run(True)
    assert by_hand.keys() == by_trainer.keys()
    for name, value in by_hand.items():
        torch.testing.assert_close(by_trainer[name], value, msg=name)


def test_the_official_mean_is_over_every_matrix_of_a_batched_site():
    """A convolution with two groups has two pairs of bases, a linear layer one: the mean is over six errors."""
    model = nn.ModuleDict({"linear": nn.Linear(7, 5), "conv": nn.Conv1d(8, 6, 2, groups=2)}).double()
    adapter = attach(model, SORSA(rank=2, mode="gradient", gamma=0.3), "all")
    perturb(adapter)
    factors = [site.factors for site in adapter.sites.values()]
    found = [orthonormality_error(q).reshape(-1) for f in factors for q in (f.L, f.A.mT)]
    assert torch.cat(found).numel() == 6
    bases = [p for f in factors for p in (f.L, f.A)]
    expected = torch.autograd.grad(0.3 / 0.5 * torch.cat(found).mean(), bases)
    adapter.before_step(peak_lr=0.5)
    for p, gradient in zip(bases, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-12)


def test_the_polar_step_in_half_precision():
    model = nn.Sequential(nn.Linear(9, 7))
    adapter = attach(model, SORSA(rank=3, mode="retract"), ["0"])
    model.bfloat16()
    perturb(adapter)
    adapter.after_step()
    for q in (adapter.sites["0"].factors.L, adapter.sites["0"].factors.A.mT):
        assert q.dtype == torch.bfloat16
        assert orthonormality_error(q.double()) < 0.05  # rounding of the entries
