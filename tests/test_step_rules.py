"""Around the step: LoRA+, Riemannian preconditioning and LoRA-Pro, by their formulas and in every way to train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import adapt, close, host, perturb
from oracle import Array, near
from own_data import assert_equal_bits, command, place, record, saved_models, training, weights
from rows import label, methods
from test_train import interrupted
from test_trainer import WithLoss, arguments, collate, data, make, trainer, values
from torch import Tensor, nn
from torch.nn import functional as F

import svdpeft
from svdpeft.adapter.gradients import LoRAPro, Riemannian
from svdpeft.compare import report, runner
from svdpeft.compare.reading import read_spec
from svdpeft.compare.report.specification import toml
from svdpeft.compare.run import Job
from svdpeft.compare.store import Store
from svdpeft.finetuning.order import read_order
from svdpeft.layers.experts import Experts
from svdpeft.methods.base import Factored, Factors
from svdpeft.training.distribution import prepare

__all__ = ["place", "saved_models"]  # fixtures

NAMES = ["riemannian", "lora-pro"]
WITH_CORE = svdpeft.SORSA(rank=3, alpha=6.0, gamma=0)
METHODS = [
    svdpeft.LoRA(rank=3, alpha=6.0),
    svdpeft.LoRA(rank={"0": 2, ".*": 3}, alpha=6.0),
    svdpeft.PiSSA(rank=3),
    WITH_CORE,
    svdpeft.MoSLoRA(rank=3),
    svdpeft.DoRA(svdpeft.LoRA(rank=3)),
    svdpeft.OPLoRA(rank=2, protects=1),
]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8)).double()


def moved(model: nn.Module, method: Any, **options: Any) -> svdpeft.Adapter:
    """An adapter off its start, with gradients of both factors."""
    adapter = svdpeft.attach(model, method, **options)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model(torch.randn(5, 6, dtype=torch.float64)).square().sum().backward()
    return adapter


def parts(site: Any) -> tuple[Array, Array, Array, Array, float]:
    """Q, P, g_L, g_A and s of a site, as the equation has them."""
    f: Factors = site.factors
    left, right = f.L.detach().numpy(), f.A.detach().numpy()
    if "C" in f._parameters:
        core = f.C.detach().numpy()
        core = np.diag(core) if core.ndim == 1 else core
        left, right = left @ core, core @ right
    method = getattr(site.method, "inner", site.method)
    assert f.L.grad is not None
    assert f.A.grad is not None
    return left, right, f.L.grad.numpy().copy(), f.A.grad.numpy().copy(), method.scale


def riemannian(q: Array, p: Array, of_left: Array, of_right: Array, s: float, delta: float) -> tuple[Array, Array]:
    r = q.shape[1]
    return (
        of_left @ np.linalg.inv(p @ p.T + delta * np.eye(r)),
        np.linalg.inv(q.T @ q + delta * np.eye(r)) @ of_right,
    )


def nearest(q: Array, p: Array, of_left: Array, of_right: Array, s: float) -> tuple[Array, Array]:
    """LoRA-Pro by brute force: of all minimisers of ‖s(X P + Q Y) − G‖ the one nearest to the gradients.

    G is any matrix with g_L = s G Pᵀ and g_A = s Qᵀ G, and the least squares are those of a matrix (mn, (m + n) r).
    """
    (m, r), n = q.shape, p.shape[1]
    rows = np.concatenate([np.kron(np.eye(m), s * p), np.kron(s * q.T, np.eye(n))])  # row-major vec(G) -> g_L, g_A
    g = np.linalg.lstsq(rows, np.concatenate([of_left.ravel(), of_right.ravel()]), rcond=None)[0]
    here = np.concatenate([of_left.ravel(), of_right.ravel()])
    step = s * np.concatenate([np.kron(np.eye(m), p.T), np.kron(q, np.eye(n))], 1)  # vec(X), vec(Y) -> vec(s(XP + QY))
    best = here + np.linalg.lstsq(step, g - step @ here, rcond=1e-12)[0]
    return best[: m * r].reshape(m, r), best[m * r :].reshape(r, n)


# -- the formulas ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [1e-6, 0.5])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_riemannian(method: Any, delta: float):
    adapter = moved(net(), method)
    before = {name: parts(site) for name, site in adapter.sites.items()}
    others = {n: p.grad.clone() for n, p in adapter.named_parameters() if n[-1] not in "LA" and p.grad is not None}
    adapter.before_step(1e-2, gradients="riemannian" if delta == 1e-6 else Riemannian(delta))
    for name, site in adapter.sites.items():
        of_left, of_right = riemannian(*before[name], delta)
        near(site.factors.L.grad, of_left)
        near(site.factors.A.grad, of_right)
    for name, gradient in others.items():  # C, mag: as they were
        assert torch.equal(dict(adapter.named_parameters())[name].grad, gradient)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_lora_pro_is_the_nearest_of_the_least_squares_solutions(method: Any):
    adapter = moved(net(), method)
    before = {name: parts(site) for name, site in adapter.sites.items()}
    adapter.before_step(1e-2, gradients=LoRAPro(delta=0.0))
    for name, site in adapter.sites.items():
        for found, expected in zip((site.factors.L.grad, site.factors.A.grad), nearest(*before[name]), strict=True):
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-8 * np.abs(expected).max())


def test_the_step_of_lora_pro_is_that_of_full_fine_tuning_on_two_subspaces():
    adapter = moved(net(), svdpeft.LoRA(rank=3, alpha=6.0))
    q, p, _, _, s = parts(adapter.sites["0"])
    g = np.random.default_rng(0).standard_normal((8, 6))
    of_left, of_right = (
        t.numpy()
        for t in LoRAPro(delta=0.0)(
            *map(torch.from_numpy, (q.copy(), p.copy(), s * g @ p.T, s * q.T @ g)),
            s,  # type: ignore[arg-type]
        )
    )
    onto = [a @ np.linalg.pinv(a) for a in (q, p.T)]
    near(s * (of_left @ p + q @ of_right), onto[0] @ g + (np.eye(8) - onto[0]) @ g @ onto[1])


@pytest.mark.parametrize("rule", [Riemannian(delta=0.0), LoRAPro(delta=0.0)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_step_does_not_depend_on_how_the_product_is_split(rule: Callable[..., tuple[Tensor, Tensor]], scale: float):
    generator = torch.Generator().manual_seed(0)
    m, n, r = 8, 6, 3
    q, p, g, turn = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((m, r), (r, n), (m, n), (r, r))
    )
    steps = []
    for t in (torch.eye(r, dtype=torch.float64), turn):
        left, right = q @ t, torch.linalg.solve(t, p)
        of_left, of_right = rule(left, right, scale * g @ right.mT, scale * left.mT @ g, scale)
        steps.append(scale * (of_left @ right + left @ of_right))
    near(steps[1], steps[0].numpy())
    plain = [
        scale**2 * (g @ right.mT @ right + left @ left.mT @ g)
        for left, right in ((q, p), (q @ turn, turn.inverse() @ p))
    ]
    assert (plain[0] - plain[1]).abs().max() > 0.1, "which plain gradients do"


@pytest.mark.parametrize("rule", NAMES)
def test_at_the_start_of_lora_the_first_step_moves_the_left_factor_alone(rule: str):
    model = net()
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=3))
    model(torch.randn(5, 6, dtype=torch.float64)).square().sum().backward()
    before = {name: parts(site) for name, site in adapter.sites.items()}
    adapter.before_step(1e-2, gradients=rule)
    for name, site in adapter.sites.items():
        _, p, of_left, _, _ = before[name]
        assert not site.factors.A.grad.any()
        np.testing.assert_allclose(site.factors.L.grad.numpy(), of_left @ np.linalg.inv(p @ p.T), rtol=1e-4)


def test_sites_of_one_shape_and_two_scales():
    adapter = moved(net(), None, targets={"0": svdpeft.LoRA(rank=2, alpha=2.0), "4": svdpeft.LoRA(rank=2, alpha=8.0)})
    before = {name: parts(site) for name, site in adapter.sites.items()}
    assert [s for *_, s in before.values()] == [1.0, 4.0]
    adapter.before_step(1e-2, gradients=LoRAPro(delta=0.0))
    for name, site in adapter.sites.items():
        np.testing.assert_allclose(site.factors.L.grad.numpy(), nearest(*before[name])[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_matrices_of_a_batch_have_a_rule_each(name: str):
    """A layer of several matrices, and sites of equal shapes: what one call does for all is what each is due alone."""
    layer, *_ = Experts().examples()[0]
    model = nn.ModuleDict({"layer": layer})
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=2), targets="all")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))
    for p in adapter.parameters():
        p.grad = torch.randn_like(p)
    rule = {"riemannian": Riemannian(), "lora-pro": LoRAPro()}[name]
    sites = list(adapter.sites.values())
    assert any(site.factors.L.ndim == 3 for site in sites)
    expected = []
    for site in sites:
        f = site.factors
        flat = [
            t.detach().clone().flatten(0, -3) if t.ndim > 2 else t.detach().clone()[None]
            for t in (f.L, f.A, f.L.grad, f.A.grad)
        ]
        expected.append([rule(*matrices, 1.0) for matrices in zip(*flat, strict=True)])
    adapter.before_step(1e-2, gradients=name)
    for site, each in zip(sites, expected, strict=True):
        for i, (of_left, of_right) in enumerate(each):
            f = site.factors
            near(f.L.grad.reshape(-1, *f.L.shape[-2:])[i], of_left.numpy())
            near(f.A.grad.reshape(-1, *f.A.shape[-2:])[i], of_right.numpy())


OF_THE_FORM = [m for m in methods(factored=True) if isinstance(m, Factored) and m.pair is not None]


@pytest.mark.parametrize("method", OF_THE_FORM, ids=label)
def test_a_pair_is_what_the_gradients_of_both_factors_are_made_of(method: Factored):
    """Of every registered method that says so: ∂L = s G Pᵀ and ∂A = s QᵀG for the G of its change."""
    model, _ = host(("linear", 0))
    adapter = adapt(model, method)
    perturb(adapter)
    (site,) = adapter.sites.values()
    f = site.factors
    assert site.method.pair is not None
    product = site.method.pair(f)
    g = torch.randn(site.shape[1:], dtype=torch.float64)
    change = site.method.product(f)
    assert change is not None
    of_left, of_right = torch.autograd.grad((g * change.dense()).sum(), [f.L, f.A])
    core = torch.eye(product.rank, dtype=torch.float64) if product.C is None else product.tensor_core
    core = torch.diag(core) if core.ndim == 1 else core
    close(of_left, product.scale * g @ (core @ f.A).mT)
    close(of_right, product.scale * (f.L @ core).mT @ g)


# -- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cls", [svdpeft.Trainer, transformers.Trainer])
def test_a_trainer_clips_then_corrects_then_steps(name: str, cls: type, tmp_path: Path):
    batch = collate(data()[:4])
    model = make(WithLoss)
    model.norm = nn.Identity()
    adapter = svdpeft.attach(model, svdpeft.PiSSA(rank=2), ["body"])
    for _ in range(2):
        adapter.model.zero_grad()
        F.cross_entropy(model(batch["x"]).logits, batch["labels"]).backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 0.01)
        adapter.before_step(0.1, gradients=name)
        with torch.no_grad():
            for p in adapter.parameters():
                p -= 0.1 * p.grad
    expected = values(adapter)
    adapter.detach()

    def run(**options: Any) -> dict[str, Tensor]:
        model = make(WithLoss)
        model.norm = nn.Identity()
        adapter = svdpeft.attach(model, svdpeft.PiSSA(rank=2), ["body"])
        own: dict[str, Any] = {"gradients": name} if cls is svdpeft.Trainer else {}
        if not own:
            own["callbacks"] = [svdpeft.AdapterCallback(adapter, gradients=name)]
        constant = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.01}
        args = arguments(tmp_path, max_steps=2, **{**constant, **options})
        trainer(model, adapter, args, cls, train_dataset=data()[:4], **own).train()
        return values(adapter)

    accumulated = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    for found in (run(), run(**accumulated)):
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)
    free = run(max_grad_norm=0.0)
    assert max((free[key] - expected[key]).abs().max() for key in free) > 1e-3, "it would be seen were it not clipped"


@pytest.mark.parametrize("options", [{"gradients": "riemannian"}, {"gradients": "lora-pro"}, {"loraplus_ratio": 16.0}])
def test_a_training_goes_on_to_the_same_bits(options: dict[str, Any], tmp_path: Path):
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}

    def run(resume: str | None = None, **options: Any) -> dict[str, Tensor]:
        model = make()
        adapter = svdpeft.attach(model, svdpeft.LoRA(rank=2, dropout=0.2), ["body"], train=["head"])
        trainer(model, adapter, arguments(tmp_path, **args), **options).train(resume_from_checkpoint=resume)
        return values(adapter)

    through = run(**options)
    torch.manual_seed(99)
    again = run(str(tmp_path / "checkpoint-3"), **options)
    plain = run()
    for name, value in through.items():
        assert torch.equal(value, again[name]), name
    assert any((value - plain[name]).abs().max() > 1e-3 for name, value in through.items())


def test_what_there_is_nothing_to_correct_of():
    model = net()
    adapter = svdpeft.attach(model, svdpeft.PiSSA(rank=2), ["0", "2"])
    model[0](torch.randn(5, 6, dtype=torch.float64)).square().sum().backward()
    assert adapter.sites["2"].factors.L.grad is None
    before = parts(adapter.sites["0"])
    adapter.before_step(1e-2, gradients="riemannian")
    near(adapter.sites["0"].factors.L.grad, riemannian(*before, 1e-6)[0])
    assert adapter.sites["2"].factors.L.grad is None
    adapter.model.zero_grad()
    with pytest.raises(RuntimeError, match="no factor has a gradient for a rule to correct: call before_step after"):
        adapter.before_step(1e-2, gradients="riemannian")
    model[0](torch.randn(5, 6, dtype=torch.float64)).square().sum().backward()
    adapter.sites["0"].factors.L.grad[0, 0] = torch.inf  # what a scaler of float16 leaves out
    untouched = adapter.sites["0"].factors.A.grad.clone()
    adapter.before_step(1e-2, gradients="riemannian")
    assert torch.equal(adapter.sites["0"].factors.A.grad, untouched)


def test_a_rule_of_ones_own():
    adapter = moved(net(), svdpeft.LoRA(rank=3, alpha=6.0))
    before = {name: parts(site) for name, site in adapter.sites.items()}
    adapter.before_step(1e-2, gradients=lambda left, right, of_left, of_right, scale: (scale * left, 2 * of_right))
    for name, site in adapter.sites.items():
        near(site.factors.L.grad, 2.0 * before[name][0])
        near(site.factors.A.grad, 2 * before[name][3])


# -- LoRA+ -----------------------------------------------------------------------------------------------------


def test_loraplus_gives_the_left_factor_a_rate_of_its_own(tmp_path: Path):
    model = make()
    adapter = svdpeft.attach(model, svdpeft.DoRA(svdpeft.LoRA(rank=2)), ["body"], train=["head"])
    args = arguments(tmp_path, weight_decay=0.1)

    def found(**options: Any) -> dict[str, set[float]]:
        groups = trainer(model, adapter, args, loraplus_ratio=16.0, **options).create_optimizer().param_groups
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        assert len(rates) == len(list(adapter.parameters()))
        return {role: {rates[id(p)] for p in its} for role, its in adapter.roles().items()}

    assert found() == {"L": {0.16}, "A": {0.01}, "mag": {0.01}, "whole": {0.01}}  # the published code: mag as L
    assert found(role_lr={"A": 0.5, "whole": 0.25}) == {"L": {8.0}, "A": {0.5}, "mag": {0.01}, "whole": {0.25}}
    with pytest.raises(ValueError, match=r"role_lr says a rate of L, 0\.5, and loraplus_ratio 16\.0 another"):
        found(role_lr={"L": 0.5})
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for options in ({"loraplus_ratio": 16.0}, {"role_lr": {"A": 0.5}}):
        with pytest.raises(ValueError, match="for the optimizer that the trainer makes, and here is another"):
            trainer(model, adapter, args, optimizers=(optimizer, None), **options)


# -- refusals --------------------------------------------------------------------------------------------------

NO_PAIR = [
    (svdpeft.VeRA(rank=4), "trains b, d"),
    (svdpeft.IA3(), "trains l"),
    (svdpeft.SVFT(), "trains C"),
    (svdpeft.GraLoRA(rank=2), "trains L, A"),
    (svdpeft.DeLoRA(rank=2), "trains L, A, strength"),
    (svdpeft.DoRA(svdpeft.VeRA(rank=4)), "trains b, d, mag"),
    (svdpeft.Full(), "has no factors"),
]
OWN_GRADIENTS = [
    svdpeft.StelLA(rank=2),
    svdpeft.PoLAR(rank=2),
    svdpeft.SORSA(rank=2, mode="gradient"),
    svdpeft.LoRA(rank=2, allocate={"target_rank": 1}),
    svdpeft.AdaLoRA(rank=2, allocate={"target_rank": 1, "importance": "code"}),
]


@pytest.mark.parametrize(("method", "told"), NO_PAIR, ids=[str(method) for method, _ in NO_PAIR])
def test_methods_without_two_such_factors_are_refused_by_rules(method: Any, told: str, tmp_path: Path):
    model = make()
    adapter = svdpeft.attach(model, method, ["body"], train=["head"], clip_rank=True)
    with pytest.raises(ValueError, match=f"two thin factors L and A that both train, and .* {told}: it is defined for"):
        trainer(model, adapter, arguments(tmp_path), gradients="riemannian")
    with pytest.raises(ValueError, match=f" {told}"):
        svdpeft.AdapterCallback(adapter, gradients="lora-pro")
    with pytest.raises(ValueError, match=f" {told}"):
        adapter.before_step(1e-2, gradients="lora-pro")
    if "L, A" not in told:  # whose rates may differ wherever they are
        with pytest.raises(ValueError, match=rf"loraplus_ratio 4\.0 is that of the rates of L and A, and .* {told}"):
            trainer(model, adapter, arguments(tmp_path), loraplus_ratio=4.0)


@pytest.mark.parametrize("method", OWN_GRADIENTS, ids=str)
def test_methods_that_look_at_gradients_themselves_are_refused(method: Any, tmp_path: Path):
    model = make()
    adapter = svdpeft.attach(model, method, ["body"])
    with pytest.raises(ValueError, match="itself acts on gradients, or keeps something of them"):
        trainer(model, adapter, arguments(tmp_path), gradients="lora-pro")


def test_what_cannot_be_says_so(tmp_path: Path):
    model = make()
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=2), ["body"])
    with pytest.raises(ValueError, match="gradients='riemanian' is no rule for gradients: did you mean 'riemannian'"):
        trainer(model, adapter, arguments(tmp_path), gradients="riemanian")
    for ratio in (0, -1.0, True, float("inf"), "16"):
        with pytest.raises(ValueError, match=r"loraplus_ratio .* is not a finite number above 0"):
            trainer(model, adapter, arguments(tmp_path), loraplus_ratio=ratio)
    for rule in (Riemannian, LoRAPro):
        with pytest.raises(ValueError, match=r"delta -1\.0 is negative"):
            rule(delta=-1.0)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=object()))
    with pytest.raises(ValueError, match="DeepSpeed takes its step within backward and does not give them away"):
        prepare(accelerator, adapter, corrects=True)
    prepare(accelerator, adapter)


def test_several_methods_must_all_have_the_factors(tmp_path: Path):
    model = make()
    adapter = svdpeft.attach(model, targets={"body": svdpeft.LoRA(rank=2), "head": svdpeft.IA3()})
    with pytest.raises(ValueError, match=r"and IA3\(\) trains l"):
        trainer(model, adapter, arguments(tmp_path), gradients="riemannian")


# -- train and compare -----------------------------------------------------------------------------------------


def test_train_takes_them_and_is_resumed_with_them_alone(place: Any):
    around: dict[str, Any] = {"method": "lora:rank=4", "loraplus_ratio": 4.0, "gradients": "lora-pro", "batch_size": 4}
    made = training(out="whole", save_every=2, epochs=2, **around)
    assert dict(made.plan())["steps"].endswith("cosine from 0.01, of L 4 times that; gradients lora-pro")
    made.run(progress=False)
    assert record("whole")["settings"]["recipe"]["loraplus_ratio"] == 4.0
    interrupted("parts", epochs=2, **around)
    result = command("--resume", code=2, out="parts", save_every=2, epochs=2, **{**around, "gradients": "riemannian"})
    assert "recipe.gradients was 'lora-pro' and is 'riemannian'" in result.stderr
    command("--resume", out="parts", save_every=2, epochs=2, **around)
    assert_equal_bits(weights("parts"), weights("whole"))
    training(out="plain", epochs=2, method="lora:rank=4", batch_size=4).run(progress=False)
    assert any(not torch.equal(value, weights("plain")[name]) for name, value in weights("whole").items())


def test_an_order_says_what_cannot_be():
    order = {"model": "smollm2-135m", "task": "wordproblems", "method": "lora:rank=4"}
    with pytest.raises(ValueError, match="did you mean 'lora-pro'"):
        read_order(None, {**order, "gradients": "lorapro"})
    with pytest.raises(ValueError, match="loraplus_ratio 0 is not a finite number above 0"):
        read_order(None, {**order, "loraplus_ratio": 0})


def test_a_comparison_has_them_by_line(tiny: Any, tmp_path: Path):
    options = {**tiny, "seeds": [0], "search": False}
    words = "lora:rank=2,lora:rank=2:loraplus_ratio=8:label=LoRA+,lora:rank=2:gradients=riemannian"
    spec = read_spec(**options, methods=words)
    assert [entry.label for entry in spec.methods] == ["LoRA rank=2", "LoRA+", "LoRA rank=2 gradients=riemannian"]
    plain, plus, rule = (Job(spec, entry, None, 0) for entry in spec.methods)
    assert (plain.recipe.loraplus_ratio, plus.recipe.loraplus_ratio, rule.recipe.gradients) == (None, 8, "riemannian")
    assert "loraplus_ratio" not in plain.identity()  # its records are those of an older comparison
    assert plus.identity() == {**plain.identity(), "loraplus_ratio": 8}
    assert rule.identity() == {**plain.identity(), "gradients": "riemannian"}
    records = runner.compare(spec, tmp_path)
    assert not [r["error"] for r in records if "error" in r]
    losses = [r["loss"][-1][1] for r in records]
    assert len(set(losses)) == 3
    written = toml(report.read(Store(tmp_path)))
    (tmp_path / "again.toml").write_text(written)
    again = read_spec(tmp_path / "again.toml")
    assert [e.around() for e in again.methods] == [e.around() for e in spec.methods]
    assert json.dumps(again.to_json()["methods"]) == json.dumps(spec.to_json()["methods"])
    for word, told in (
        ("ia3:gradients=riemannian", r"and IA3\(\) trains l"),
        ("ia3:loraplus_ratio=4", r"and IA3\(\) trains l"),
        ("lora:gradients=rieman", "did you mean 'riemannian'"),
        ("lora:gradients=3", "gradients 3 is not a text"),
        ("lora:loraplus_ratio=0", "is not a finite number above 0"),
    ):
        with pytest.raises(ValueError, match=told):
            read_spec(**options, methods=word)
