"""SC-LoRA, DuDe, NoRA, SALT, SSVD-O, LoRA-Dash, DisLoRA, GoRA and DiTASK: their formulas in NumPy float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import equal_bits, perturb
from oracle import Array, check, every_shape, linear, near, output, rank_of, tensors, triplets
from torch import Tensor, nn

import svdpeft
from svdpeft import (
    SALT,
    SSVD,
    SSVDO,
    Calibration,
    DisLoRA,
    DiTASK,
    DoRA,
    DuDe,
    GoRA,
    LoRADash,
    NoRA,
    PiSSA,
    SCLoRA,
    attach,
    calibrate,
)
from svdpeft.methods.base import Given, Progress, Statistics
from svdpeft.training.resume import load_training_state, save_training_state

Shape = tuple[int, int]


def inputs(shape: Shape, seed: int, count: int = 40) -> Array:
    """Inputs of the layer with a mean and a spread of their own."""
    draws = np.random.default_rng(seed)
    return draws.standard_normal((count, shape[1])) * draws.uniform(0.2, 2, shape[1]) + draws.standard_normal(shape[1])


def seen(shape: Shape, x: Array, **options: Any) -> Calibration:
    model = linear(shape)[0]
    call = lambda model, batch: model["layer"](batch)  # noqa: E731
    return calibrate(model, [torch.from_numpy(part) for part in np.split(x, 4)], ["layer"], call=call, **options)


# -- SC-LoRA ---------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9])
def test_sc_lora(shape: Shape, beta: float):
    task, kept = inputs(shape, 1), inputs(shape, 2, 60)
    _, w, _ = linear(shape)
    outputs = [x @ w.T for x in (task, kept)]
    moments = [y.T @ y / len(y) for y in outputs]
    values, q = np.linalg.eigh((1 - beta) * moments[0] - beta * moments[1])

    def weight(f: dict[str, Array], w: Array) -> Array:
        return w + 2 * (f["L"] @ f["A"] - f["L0"] @ f["A0"])

    calibration = seen(shape, task)
    if beta:
        calibration = calibration.preserving(seen(shape, kept))
    method = SCLoRA(rank=3, alpha=6, beta=beta)
    _, f, _ = check(method, shape, weight, 3 * sum(shape), calibration=calibration, targets=["layer"])
    near(f["A"], f["L"].T @ w)
    near(f["L"].T @ f["L"], np.eye(3))
    # Of an output that no input reaches nothing is known, and its eigenvalue of zero counts for no direction.
    order = np.argsort(np.where(np.abs(values) < 1e-10, -np.inf, values))[::-1][:3]
    for i, found in zip(order, f["L"].T, strict=True):
        near(found * np.sign(found @ q[:, i]), q[:, i])


def test_sc_lora_says_what_it_lacks():
    task = inputs((6, 9), 1)
    with pytest.raises(ValueError, match=r"inputs of layer on data that are to be kept: pass .*\.preserving\("):
        attach(linear((6, 9))[0], SCLoRA(rank=2), ["layer"], calibration=seen((6, 9), task))
    with pytest.raises(ValueError, match=r"SCLoRA of rank 5 starts from directions .* which 4 inputs show no more"):
        attach(linear((6, 9))[0], SCLoRA(rank=5), ["layer"], calibration=seen((6, 9), task[:4]))
    with pytest.raises(ValueError, match=r"beta 1\.5 is outside"):
        SCLoRA(beta=1.5)
    with pytest.raises(ValueError, match="on what is to be kept has no inputs of layer"):
        seen((6, 9), task).preserving({})


def test_what_is_to_be_kept_comes_back_from_a_file(tmp_path: Any):
    task, kept = (seen((6, 9), inputs((6, 9), i)) for i in (1, 2))
    both = task.preserving(kept)
    both.save(tmp_path / "seen")
    found = Calibration.load(tmp_path / "seen")
    for name in ("second", "kept"):
        assert equal_bits(getattr(found["layer"], name), getattr(both["layer"], name))
    assert both["layer"].kept is not None
    assert kept["layer"].second is not None
    assert torch.equal(both["layer"].kept, kept["layer"].second / 40)
    Calibration({"layer": both["layer"]._replace(kept=torch.zeros(2, 2))}).save(tmp_path / "seen")
    with pytest.raises(ValueError, match=r"at layer the inputs to preserve have shape \[2, 2\]"):
        Calibration.load(tmp_path / "seen")


# -- DuDe ------------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("options", [{}, {"magnitude": "columns"}, {"norm_gradient": True}], ids=str)
def test_dude_is_dora_around_pissa_to_the_bit(shape: Shape, options: dict[str, Any]):
    found = []
    for method in (DuDe(PiSSA(rank=3), **options), DoRA(PiSSA(rank=3), **options)):
        model, _, x = linear(shape)
        adapter = attach(model, method)
        perturb(adapter)
        out = model["layer"](torch.from_numpy(x))
        out.pow(3).sum().backward()
        gradients = [p.grad for p in adapter.parameters()]
        found.append([out, adapter.delta("layer"), *gradients, *adapter.sites["layer"].factors.tensors().values()])
    assert len(found[0]) == 2 + 3 + 6
    assert all(equal_bits(one, other) for one, other in zip(*found, strict=True))
    assert DuDe().inner == PiSSA()


@every_shape
def test_dude(shape: Shape):
    model, w, x = linear(shape)
    adapter = attach(model, DuDe(PiSSA(rank=3, alpha=6)))
    u, s, vh = triplets(w, 3)
    near(output(model, x), x @ w.T)
    perturb(adapter)
    f = tensors(adapter)
    v = w + 2 * (f["L"] @ f["A"] - (u * s) @ vh)
    near(output(model, x), x @ (f["mag"][:, None] * v / np.linalg.norm(v, axis=1, keepdims=True)).T)
    assert adapter.trainable_count == 3 * sum(shape) + shape[0]


# -- NoRA ------------------------------------------------------------------------------------------------------


@every_shape
def test_nora(shape: Shape):
    def weight(f: dict[str, Array], w: Array) -> Array:
        u, s, vh = triplets(w, 4)
        return w + 0.5 * (u * np.sqrt(s)) @ f["P"] @ f["Q"] @ (np.sqrt(s)[:, None] * vh)

    adapter, start, _ = check(NoRA(rank=4, inner_rank=2, alpha=2), shape, weight, 2 * 4 * 2, size=1.0)
    assert not start["P"].any()
    assert 0.2 < np.abs(start["Q"]).max() <= 0.5
    assert rank_of(adapter.delta("layer").numpy()) == 2 == adapter.sites["layer"].method.export_rank(*shape)


def test_ranks_of_nora():
    model = nn.ModuleDict({"layer": nn.Linear(9, 6)})
    with pytest.raises(ValueError, match="inner_rank 0 is below 1"):
        NoRA(inner_rank=0)
    wide: Any = attach(model, NoRA(), clip_rank=True).sites["layer"].method
    assert wide.inner_rank == 6
    assert NoRA(rank=4, inner_rank=2).at("layer", 9, 6).scale == 1.0


# -- SALT ------------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("relu", [False, True])
def test_salt(shape: Shape, relu: bool):
    k = 2  # ⌊0.4 · 6⌋ and ⌊0.4 · 7⌋

    def weight(f: dict[str, Array], w: Array) -> Array:
        u, s, vh = triplets(w)
        core = np.zeros((len(s), len(s)))
        core[:k, :k] = np.diag(f["a"] * s[:k] + f["b"])
        core[k:, k:] = np.diag(s[k:]) + f["X"] @ f["Y"]
        return u @ (np.maximum(core, 0) if relu else core) @ vh

    tail = min(shape) - k
    method = SALT(rank=3, ratio=0.4, relu=relu)
    adapter, start, _ = check(method, shape, weight, 2 * k + 2 * 3 * tail)
    near(start["a"], np.ones(k))
    assert not start["b"].any()
    assert not start["Y"].any()
    assert 0.5 < np.abs(start["X"]).max() <= 2**0.5
    stated = min(shape) if relu else k + 3
    assert adapter.sites["layer"].method.export_rank(*shape) == stated
    assert rank_of(adapter.delta("layer").numpy()) <= stated


def test_salt_trains_off_the_diagonal_from_the_first_step_with_a_relu_too():
    model, _, x = linear((6, 9))
    adapter = attach(model, SALT(rank=3, relu=True))
    model["layer"](torch.from_numpy(x)).pow(3).sum().backward()
    assert bool((adapter.sites["layer"].factors.Y.grad != 0).all())


def test_sizes_of_salt():
    with pytest.raises(ValueError, match=r"rank 6 is outside \[1, 5\] at layer"):
        attach(linear((6, 9))[0], SALT(rank=6))
    with pytest.raises(ValueError, match=r"ratio 1\.0 is outside"):
        SALT(ratio=1.0)
    adapter = attach(linear((1, 9))[0], SALT())  # one singular value: no tail
    assert set(tensors(adapter)) == {"L", "sigma", "A", "a", "b"}
    assert adapter.trainable_count == 2


# -- SSVD-O ----------------------------------------------------------------------------------------------------


def cayley(values: Array, size: int, rank: int) -> Array:
    """(I + Q)(I − Q)⁻¹ of the first directions, with the lower triangle of Q row by row."""
    q, turn = np.zeros((size, size)), np.eye(rank)
    q[np.tril_indices(size, -1)] = values
    q -= q.T
    turn[:size, :size] = (np.eye(size) + q) @ np.linalg.inv(np.eye(size) - q)
    return turn


@every_shape
@pytest.mark.parametrize("sizes", [(4, 4), (2, 3), (1, 4), (3, 1), (1, 1), (9, None)], ids=str)
def test_ssvd_o(shape: Shape, sizes: tuple[int, int | None]):
    turned = [min(size or 4, 4) for size in sizes]

    def weight(f: dict[str, Array], w: Array) -> Array:
        u, s, vh = triplets(w, 4)
        left, right = (
            cayley(f[f"Q_{side}"], size, 4) if size > 1 else np.eye(4)
            for side, size in zip(("outputs", "inputs"), turned, strict=True)
        )
        return w + u @ (left @ np.diag(s + f["C"]) @ right - np.diag(s)) @ vh

    count = 4 + sum(size * (size - 1) // 2 for size in turned)
    adapter, _, _ = check(SSVDO(rank=4, outputs=sizes[0], inputs=sizes[1]), shape, weight, count)
    assert rank_of(adapter.delta("layer").numpy()) == 4 == adapter.sites["layer"].method.export_rank(*shape)
    with pytest.raises(ValueError, match="inputs 0 is below 1"):
        SSVDO(inputs=0)


@every_shape
def test_ssvd_o_without_the_outputs_is_ssvd(shape: Shape):
    found = []
    for method in (SSVDO(rank=3, outputs=1), SSVD(rank=3)):
        adapter = attach(linear(shape)[0], method)
        perturb(adapter)
        found.append(adapter.delta("layer"))
    near(found[0], found[1])


# -- LoRA-Dash and DisLoRA -------------------------------------------------------------------------------------


def choice(w: Array, own: Array, size: int, pool: int) -> Any:
    """The directions that the papers choose: of the first ``pool`` triplets those of the largest rates."""
    u, s, vh = triplets(w)
    rate = np.abs(np.diag(u.T @ own @ vh.T)) / s
    return np.argsort(-rate[:pool], kind="stable")[:size]


def own_change(f: dict[str, Array], scale: float) -> Array:
    core = np.diag(f["C"]) if "C" in f else np.eye(f["L"].shape[1])
    now = f["L"] @ core @ f["A"]
    return scale * (now - f["L0"] @ np.diag(f["C0"]) @ f["A0"] if "C0" in f else now)


DASHED = [LoRADash(rank=3, alpha=6, directions=2, warmup=2), DisLoRA(rank=3, alpha=6, directions=2, warmup=2)]


@every_shape
@pytest.mark.parametrize("method", DASHED, ids=str)
def test_both_stages(shape: Shape, method: Any):
    def weight(f: dict[str, Array], w: Array) -> Array:
        u, _, vh = triplets(w)
        chosen = np.arange(2)  # none has changed more than another: the first
        strength = 2 if isinstance(method, DisLoRA) else 1
        return w + own_change(f, 2) + strength * u[:, chosen] @ np.diag(f["delta"]) @ vh[chosen]

    apart = 3 if isinstance(method, DisLoRA) else 0  # C
    adapter, start, w = check(method, shape, weight, 3 * sum(shape) + apart + 2)
    if isinstance(method, DisLoRA):
        u, s, vh = triplets(w)
        for name, expected in zip("LCA", (u[:, -3:], s[-3:], vh[-3:]), strict=True):
            near(start[name], expected)
    else:
        assert not start["L"].any()
        assert 0.5 / np.sqrt(shape[1]) < np.abs(start["A"]).max() <= 1 / np.sqrt(shape[1])
    stated = min((3 if apart == 0 else 6) + 2, *shape)
    assert adapter.sites["layer"].method.export_rank(*shape) == stated
    assert rank_of(adapter.delta("layer").numpy()) <= stated


@every_shape
@pytest.mark.parametrize("method", DASHED, ids=str)
def test_directions_are_chosen_once_after_the_warm_up_and_train_from_then_on(shape: Shape, method: Any):
    model, w, x = linear(shape)
    u, _, vh = triplets(w)
    adapter = attach(model, method)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    dis = isinstance(method, DisLoRA)
    pool = min(shape) - 3 if dis else min(shape)
    chosen: Any = np.arange(2)
    for step in range(1, 5):
        optimizer.zero_grad()
        for _ in range(3):  # accumulated: forwards are no steps
            model["layer"](torch.from_numpy(x)).pow(3).sum().backward()
        adapter.before_step(peak_lr=0.05)
        optimizer.step()
        before = tensors(adapter)
        out = output(model.eval(), x)
        adapter.after_step()
        model.train()
        f = tensors(adapter)
        np.testing.assert_array_equal(output(model.eval(), x), out)  # the choice changes no output
        model.train()
        assert bool(before["delta"].any()) == (step > 2)
        if step == 2:
            chosen = choice(w, own_change(f, 2), 2, pool)
        np.testing.assert_array_equal(f["index"], chosen)
        new = w + own_change(f, 2) + (2 if dis else 1) * u[:, chosen] @ np.diag(f["delta"]) @ vh[chosen]
        near(output(model.eval(), x), x @ new.T)
        model.train()
    if shape == (6, 9):  # of the square one they are the first by chance
        assert list(chosen) != [0, 1]


@pytest.mark.parametrize("method", DASHED, ids=str)
def test_a_training_in_two_parts_is_that_in_one(method: Any, tmp_path: Any):
    """Through a file before the choice, at it and after it; and an adapter that goes into a new training keeps it."""
    x = torch.from_numpy(linear((6, 9))[2])

    def steps(model: nn.ModuleDict, adapter: Any, count: int) -> None:
        for _ in range(count):
            adapter.before_step(peak_lr=0.05)
            grads = torch.autograd.grad(model["layer"](x).pow(3).sum(), list(adapter.parameters()))
            mine = zip(adapter.named_parameters(), grads, strict=True)
            with torch.no_grad():
                for (name, p), grad in mine:
                    p.sub_(0.01 * grad * (1 if "delta" not in name else float(adapter.sites["layer"].factors.chosen)))
            adapter.after_step()

    whole_model = linear((6, 9))[0].eval()
    whole = attach(whole_model, method)
    steps(whole_model, whole, 5)
    for first in (1, 2, 3):
        model = linear((6, 9))[0].eval()
        adapter = attach(model, method)
        steps(model, adapter, first)
        adapter.save(tmp_path / f"{first}")
        save_training_state(adapter, tmp_path / f"{first}")
        again = linear((6, 9))[0].eval()
        resumed = svdpeft.load(again, tmp_path / f"{first}")
        load_training_state(resumed, tmp_path / f"{first}")
        steps(again, resumed, 5 - first)
        assert torch.equal(resumed.delta("layer"), whole.delta("layer"))
    anew = svdpeft.load(linear((6, 9))[0].eval(), tmp_path / "3")  # without what the training knew
    index = tensors(anew)["index"]
    steps(anew.model, anew, 4)  # type: ignore[arg-type]
    np.testing.assert_array_equal(tensors(anew)["index"], index)


def test_what_has_no_direction_is_not_chosen_and_what_has_none_left_has_no_second_stage():
    model, w, _ = linear((6, 9))
    with torch.no_grad():
        u, s, vh = triplets(w)
        s[4:] = 0
        model["layer"]._parameters["weight"].copy_(torch.from_numpy((u * s) @ vh))  # type: ignore[union-attr]
    adapter = attach(model, LoRADash(rank=3, directions=4, warmup=1))
    perturb(adapter)
    adapter.before_step(peak_lr=0.1)
    adapter.after_step()
    assert sorted(tensors(adapter)["index"]) == [0, 1, 2, 3]
    adapter = attach(linear((3, 9))[0], DisLoRA(rank=3))
    assert set(tensors(adapter)) == {"L", "C", "A", "L0", "C0", "A0"}
    assert not adapter.sites["layer"].method.has_step
    assert attach(linear((3, 9))[0], LoRADash(rank=2)).sites["layer"].factors.delta.shape == (3,)


def test_a_training_that_never_reaches_the_choice_is_refused():
    adapter = attach(linear((6, 9))[0], LoRADash(rank=2))
    with pytest.raises(ValueError, match="chooses its directions after 100 steps, and this training has 100: set warm"):
        adapter.before_step(peak_lr=0.1, total_steps=100)
    with pytest.raises(ValueError, match="warmup 0 is below 1"):
        LoRADash(warmup=0)
    with pytest.raises(ValueError, match="directions -1 is below 0"):
        DisLoRA(directions=-1)


def test_penalty_of_dislora():
    torch.manual_seed(0)
    sizes = {"a": (6, 9), "b": (9, 6), "c": (7, 5)}
    model = nn.ModuleDict({k: nn.Linear(n, m, bias=False, dtype=torch.float64) for k, (m, n) in sizes.items()})
    adapter = attach(model, DisLoRA(rank=3, gamma=0.7))
    perturb(adapter)
    norms = []
    for site in adapter.sites.values():
        left, right = (site.factors.get_parameter(name).detach().numpy() for name in "LA")
        norms += [np.linalg.norm(q.T @ q - np.eye(3)) for q in (left, right.T)]
    near(adapter.penalty(), 0.7 * np.mean(norms))
    assert DisLoRA(rank=3, gamma=0.0).penalty([]) is None
    with pytest.raises(ValueError, match=r"gamma -1\.0 is negative"):
        DisLoRA(gamma=-1.0)


# -- GoRA ------------------------------------------------------------------------------------------------------

SIZES = {"a": (6, 9), "b": (9, 6), "c": (7, 5)}
SPREAD = {"a": 1.0, "b": 0.02, "c": 0.2}  # of the weights: what the ranks follow


def three() -> tuple[nn.ModuleDict, Calibration, dict[str, Array]]:
    """Three layers, a calibration on three batches, and their gradients."""
    torch.manual_seed(0)
    model = nn.ModuleDict({k: nn.Linear(n, m, bias=False, dtype=torch.float64) for k, (m, n) in SIZES.items()})
    for name, layer in model.items():
        layer.weight.data.mul_(SPREAD[name])  # type: ignore[union-attr]
    draws = np.random.default_rng(3)
    batches = [{k: torch.from_numpy(draws.standard_normal((8, n))) for k, (_, n) in SIZES.items()} for _ in range(3)]
    seen = calibrate(
        model,
        batches,
        list(SIZES),
        inputs=False,
        gradients=True,
        call=lambda model, batch: [model.get_submodule(k)(x) for k, x in batch.items()],
        loss=lambda out, batch: torch.stack([(y - 1).square().sum() for y in out]).sum(),
    )
    gradients = {}
    for name in SIZES:
        w = model[name].weight.detach().numpy()  # type: ignore[union-attr, operator]
        xs = [batch[name].numpy() for batch in batches]
        gradients[name] = sum(2 * (x @ w.T - 1).T @ x for x in xs) / 3
    return model, seen, gradients  # type: ignore[return-value]


@pytest.mark.parametrize("bounds", [(1, 32), (2, 4)], ids=str)
def test_ranks_of_gora(bounds: tuple[int, int]):
    model, seen, gradients = three()
    importance = {k: np.abs(model[k].weight.detach().numpy() * g).mean() for k, g in gradients.items()}  # type: ignore[union-attr, operator]
    adapter = attach(model, GoRA(rank=3, least=bounds[0], most=bounds[1]), list(SIZES), calibration=seen)
    budget = sum(3 * sum(shape) for shape in SIZES.values())
    for name, shape in SIZES.items():
        rank = round(importance[name] / sum(importance.values()) * budget) // sum(shape)
        rank = min(max(rank, bounds[0]), bounds[1], *shape)
        method: Any = adapter.sites[name].method
        assert method.rank == rank == adapter.sites[name].factors.A.shape[0]
        assert method.scale == pytest.approx(16 / np.sqrt(rank))
    assert len({site.factors.A.shape[0] for site in adapter.sites.values()}) > 1


def test_start_of_gora():
    model, seen, gradients = three()
    adapter = attach(model, GoRA(rank=3, alpha=5, eta=0.2, least=1), list(SIZES), calibration=seen)
    for name, (_, n) in SIZES.items():
        site: Any = adapter.sites[name]
        a, r = site.factors.A.detach().numpy(), site.method.rank
        assert 0.3 < a.std() * np.sqrt(n) < 2
        expected = -0.2 * np.sqrt(n / r) * gradients[name] @ np.linalg.pinv(a) @ a
        assert np.abs(adapter.delta(name).numpy() - expected).max() < 1e-6 * np.abs(expected).max()
    assert adapter.trainable_count == sum(s.method.rank * sum(s.shape[1:]) for s in adapter.sites.values())  # type: ignore[attr-defined]


def test_gora_starts_downhill():
    """What the published code does not: it leaves the minus out."""
    shape = (6, 9)
    model, w, x = linear(shape)

    def loss(w: Array) -> float:
        return float(((x @ w.T - 1) ** 2).sum())

    found = calibrate(
        model,
        [torch.from_numpy(x)],
        ["layer"],
        inputs=False,
        gradients=True,
        call=lambda model, batch: model.get_submodule("layer")(batch),
        loss=lambda out, batch: (out - 1).square().sum(),
    )
    adapter = attach(model, GoRA(rank=4, eta=1e-3), ["layer"], calibration=found)
    assert loss(w + adapter.delta("layer").numpy()) < loss(w) < loss(w - adapter.delta("layer").numpy())


def test_what_gora_refuses():
    model, _, _ = three()
    zero = {k: Statistics(gradient=torch.zeros(shape)) for k, shape in SIZES.items()}
    with pytest.raises(ValueError, match="GoRA finds no ranks: every gradient of the calibration is zero"):
        attach(model, GoRA(rank=2), list(SIZES), calibration=zero)
    with pytest.raises(ValueError, match="GoRA starts from the gradients of a: pass"):
        attach(model, GoRA(rank=2), list(SIZES))
    for options in ({"least": 0}, {"least": 5, "most": 4}, {"eta": -1.0}):
        with pytest.raises(ValueError, match=r"least|eta -1\.0 is outside"):
            GoRA(**options)


# -- DiTASK ----------------------------------------------------------------------------------------------------


def flow(x: float, v: Array) -> float:
    """z(1) of dz/dt = v(z), z(0) = x, in cells: from node to node, with the solution of an affine equation in each."""
    left, cell = 1.0, min(int(x), len(v) - 2)
    while True:
        slope = v[cell + 1] - v[cell]
        speed = v[cell] + (x - cell) * slope
        target = cell + 1 if speed > 0 else cell
        there = v[target]
        reached = speed != 0 and there * speed > 0
        if reached and abs(slope) > 1e-12:
            time = math.log(there / speed) / slope
        else:
            time = (target - x) / speed if reached else math.inf
        if time > left:
            return x + speed * (math.expm1(slope * left) / slope if abs(slope) > 1e-12 else left)
        x, left, cell = float(target), left - time, cell + (1 if speed > 0 else -1)


@every_shape
@pytest.mark.parametrize("cells", [2, 5, 32])
@pytest.mark.parametrize("size", [1e-3, 0.3, 3.0])
def test_ditask(shape: Shape, cells: int, size: float):
    def weight(f: dict[str, Array], w: Array) -> Array:
        u, s, vh = triplets(w)
        v = np.concatenate([[0], f["theta"], [0]]) * cells / 2
        bent = np.array([flow(x, v) for x in s / s[0] * cells / 2]) * s[0] * 2 / cells
        assert np.all(np.diff(bent) <= 1e-12)
        assert np.all(bent >= 0)
        return (u * bent) @ vh

    model, w, x = linear(shape)
    adapter = attach(model, DiTASK(cells=cells))
    near(output(model, x), x @ w.T)
    assert not adapter.delta("layer").any()
    assert adapter.trainable_count == cells - 1
    perturb(adapter, size)
    f = tensors(adapter)
    near(output(model, x), x @ weight(f, w).T)
    near(adapter.delta("layer"), weight(f, w) - w)
    adapter.fold()
    near(output(model, x), x @ weight(f, w).T)


def test_the_flow_is_that_of_the_field():
    """The closed form of the oracle, by Runge and Kutta."""
    v = np.array([0, 0.7, -0.4, 1.9, 1.9, -3.0, 0.0, 2.0, 0])
    for x in np.linspace(0, 8, 33):
        z, steps = x, 4000
        for _ in range(steps):
            k = np.interp(z, np.arange(9), v)
            k = np.interp(z + k / steps / 2, np.arange(9), v)
            z += k / steps
        assert abs(flow(x, v) - z) < 1e-5


@pytest.mark.parametrize("theta", [[0.0, 0.0, 0.0], [0.3, 0.3, 0.3], [0.5, -0.5, 0.0], [-0.2, 0.0, 0.4]], ids=str)
def test_gradients_of_ditask_where_its_formulas_have_limits(theta: list[float]):
    """Velocities that are zero, or equal at both ends of a cell, and singular values on nodes, which are 1, 2 and 3."""
    model = linear((6, 9))[0]
    with torch.no_grad():
        u, _, vh = triplets(linear((6, 9))[1])
        model["layer"]._parameters["weight"].copy_(torch.from_numpy((u * [2.0, 1.7, 1.0, 0.6, 0.5, 0.3]) @ vh))  # type: ignore[union-attr]
    adapter = attach(model, DiTASK(cells=4))
    site: Any = adapter.sites["layer"]
    start = torch.tensor(theta, dtype=torch.float64)

    def change(theta: Tensor) -> Tensor:
        return site.method.change(site.factors.instead(theta=theta))

    jacobian: Any = torch.autograd.functional.jacobian(change, start)
    assert bool(jacobian.isfinite().all())
    for i in range(3):
        step = torch.zeros(3, dtype=torch.float64).index_fill_(0, torch.tensor(i), 1e-6)
        ahead, behind = ((change(start + sign * step) - change(start)) / (sign * 1e-6) for sign in (1, -1))
        kink = (ahead - behind).abs()  # on a node the two sides may differ: any slope in between is one
        low, high = torch.minimum(ahead, behind) - 1e-5, torch.maximum(ahead, behind) + 1e-5
        assert bool(((jacobian[:, i] >= low) & (jacobian[:, i] <= high)).all()), (i, kink)
    assert bool((jacobian != 0).any())


def test_a_matrix_of_zeros_among_others():
    site = Given("a", (2, 4, 3), 0, lambda: torch.stack([torch.zeros(4, 3), torch.randn(4, 3)]).double())
    for method in (DiTASK(cells=4), LoRADash(rank=2, directions=2, warmup=1)):
        here = method.at("a", 4, 3)
        f = here.factors(site)
        for p in f.parameters():
            p.data.add_(0.1)
        here.after_step([f], Progress(step=1))
        assert bool(here.update(f).dense().isfinite().all())


def test_ditask_refuses_one_cell():
    with pytest.raises(ValueError, match="cells 1 is below 2"):
        DiTASK(cells=1)
