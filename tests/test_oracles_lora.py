"""LoRA's relatives, their papers written out in NumPy float64: other starts, other cores, other steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracle import Array, check, every_shape, linear, near, output, rank_of, tensors, triplets
from torch import nn

import svdpeft
from svdpeft import (
    Astra,
    DeLoRA,
    GraLoRA,
    LoHa,
    LoKr,
    LoRAFA,
    LoRAOne,
    LoRASB,
    MiSS,
    MoSLoRA,
    NLoRA,
    OPLoRA,
    OSoRA,
    PoLAR,
    StelLA,
    attach,
)

Shape = tuple[int, int]
EYE = np.eye(3)


def seen(shape: Shape, needs: str) -> tuple[Any, Array]:
    """A calibration of the layer that ``linear`` gives, and Σ x xᵀ or the gradient that it has seen, in float64."""
    model, w, x = linear(shape)
    batches = [torch.from_numpy(x), torch.from_numpy(x[::-1].copy() ** 2)]
    if needs == "inputs":
        found = svdpeft.calibrate(model, batches, ["layer"], call=lambda m, b: m["layer"](b))
        return found, sum(b.numpy().T @ b.numpy() for b in batches)  # type: ignore[return-value]

    def loss(out: Any, batch: Any) -> Any:
        return out.pow(2).sum()

    options: Any = {"inputs": False, "gradients": True, "loss": loss, "call": lambda m, b: m["layer"](b)}
    found = svdpeft.calibrate(model, batches, ["layer"], **options)
    return found, sum(2 * w @ b.numpy().T @ b.numpy() for b in batches) / 2  # type: ignore[return-value]


def gradients(model: nn.ModuleDict, adapter: Any, x: Array) -> dict[str, Array]:
    model["layer"](torch.from_numpy(x)).pow(3).sum().backward()
    factors = adapter.sites["layer"].factors
    return {name: factors._parameters[name].grad.numpy().copy() for name in factors.trains}


# -- cores and starts ---------------------------------------------------------------------------------------------


@every_shape
def test_moslora(shape: Shape):
    _, start, _ = check(
        MoSLoRA(rank=3, alpha=6), shape, lambda f, w: w + 2 * f["L"] @ f["C"] @ f["A"], 3 * (sum(shape) + 3)
    )
    assert start["C"].shape == (3, 3)
    assert 0.1 < np.abs(start["C"]).max() <= 3**-0.5
    assert 0.1 < np.abs(start["A"]).max() <= shape[1] ** -0.5


@every_shape
def test_miss(shape: Shape):
    """The paper's own words: inputs are cut into shards of r, the shards are added up, and D multiplies the sum."""
    adapter, start, w = check(MiSS(rank=4), shape, lambda f, w: w + f["L"] @ f["A"], 4 * shape[0])
    x = np.random.default_rng(1).standard_normal((5, shape[1]))
    padded = np.pad(x, ((0, 0), (0, -shape[1] % 4)))
    shards = padded.reshape(5, -1, 4).sum(1)
    near(x @ start["A"].T, shards)
    near(output(adapter.model, x), x @ w.T + shards @ tensors(adapter)["L"].T)


@every_shape
def test_osora(shape: Shape):
    def weight(f: dict[str, Array], w: Array) -> Array:
        u, s, vh = triplets(w, 3)
        return w + np.diag(f["o"]) @ u @ np.diag(f["C"]) @ vh - u @ np.diag(s) @ vh

    adapter, start, w = check(OSoRA(rank=3), shape, weight, 3 + shape[0])
    near(start["o"], np.ones(shape[0]))
    near(start["C"], triplets(w, 3)[1])
    assert rank_of(adapter.delta("layer").numpy()) == 3 == adapter.sites["layer"].method.export_rank(*shape)


@every_shape
@pytest.mark.parametrize("end", ["tail", "head"])
def test_astra(shape: Shape, end: Any):
    calibration, second = seen(shape, "inputs")
    _, w, _ = linear(shape)
    values, q = np.linalg.eigh(w @ second @ w.T)
    chosen = q[:, :3] if end == "tail" else q[:, -3:]

    def weight(f: dict[str, Array], w: Array) -> Array:
        return w + 2 * (f["L"] @ f["A"] - f["L0"] @ f["A0"])

    _, start, _ = check(
        Astra(rank=3, alpha=6, end=end), shape, weight, 3 * sum(shape), calibration=calibration, targets=["layer"]
    )
    # The calibration is float32, and vectors of small eigenvalues are as exact as their distances allow.
    assert np.abs(start["L"].T @ start["L"] - EYE).max() < 1e-10
    near(start["A"], start["L"].T @ w)
    if end == "head" or shape[0] <= shape[1]:
        assert np.abs(np.linalg.svd(chosen.T @ start["L"])[1] - 1).max() < 1e-3
    used = np.trace(start["L"].T @ w @ second @ w.T @ start["L"])  # how much of the outputs is there
    expected = (values[:3] if end == "tail" else values[-3:]).sum()
    assert abs(used - expected) < 1e-5 * values.sum()


@every_shape
@pytest.mark.parametrize("only", [None, "core"])
def test_nlora_is_the_nystrom_sketch(shape: Shape, only: Any):
    def weight(f: dict[str, Array], w: Array) -> Array:
        strips = w[:, :3], np.linalg.inv(w[:3, :3]), w[:3]
        return w + 2 * (f["L"] @ f["C"] @ f["A"] - strips[0] @ strips[1] @ strips[2])

    count = 9 if only else 3 * (sum(shape) + 3)
    _, start, w = check(NLoRA(rank=3, alpha=6, only=only), shape, weight, count)
    sketch = start["L"] @ start["C"] @ start["A"]
    near(sketch[:3], w[:3])  # it has the first rows and columns of the weight
    near(sketch[:, :3], w[:, :3])
    near(tensors(attach(linear(shape)[0], NLoRA(rank=3, sketch="block")))["C"], w[:3, :3])


def test_nlora_does_not_invert_what_is_not_there():
    model, _, _ = linear((6, 9))
    with torch.no_grad():
        model["layer"].weight[2, :3] = model["layer"].weight[1, :3]
    assert np.abs(tensors(attach(model, NLoRA(rank=3)))["C"]).max() < 1e3


@every_shape
def test_loha(shape: Shape):
    adapter, start, _ = check(
        LoHa(rank=2, alpha=6), shape, lambda f, w: w + 3 * (f["L"] @ f["A"]) * (f["L2"] @ f["A2"]), 4 * sum(shape)
    )
    assert not start["L2"].any()
    assert rank_of(adapter.delta("layer").numpy()) == 4 == adapter.sites["layer"].method.export_rank(*shape)


@pytest.mark.parametrize(("shape", "p", "q"), [((6, 9), 2, 3), ((9, 6), 3, 2), ((7, 8), 1, 2), ((12, 16), 3, 4)])
def test_lokr(shape: Shape, p: int, q: int):
    adapter, start, _ = check(
        LoKr(rank=2, alpha=6),
        shape,
        lambda f, w: w + 3 * np.kron(f["C"], f["L"] @ f["A"]),
        p * q + 2 * (shape[0] // p + shape[1] // q),
    )
    assert start["C"].shape == (p, q)
    expected = adapter.sites["layer"].method.export_rank(*shape)
    assert rank_of(adapter.delta("layer").numpy()) == expected == min(p, q) * 2
    assert (LoKr(factor=2).split(12), LoKr(factor=2).split(9), LoKr().split(16)) == (2, 1, 4)


@pytest.mark.parametrize(("shape", "k"), [((6, 8), 2), ((8, 12), 4), ((7, 7), 1)])
def test_gralora(shape: Shape, k: int):
    (m, n), r = shape, 4

    def weight(f: dict[str, Array], w: Array) -> Array:
        new, rows, columns, part = w.copy(), m // k, n // k, r // k
        for i in range(k):
            for j in range(k):
                left = f["L"][i][:, j * part : (j + 1) * part]
                right = f["A"][j][i * part : (i + 1) * part]
                new[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] += 2 * left @ right
        return new

    adapter, start, _ = check(GraLoRA(rank=r, alpha=8, grid=k), shape, weight, r * (m + n))
    assert 0.1 < np.abs(start["A"]).max() <= (n / k) ** -0.5
    assert rank_of(adapter.delta("layer").numpy()) == min(k * r, m, n)
    assert adapter.sites["layer"].method.export_rank(m, n) == min(k * r, m, n)


def test_gralora_says_which_grid_fits():
    with pytest.raises(ValueError, match="grid 2 does not divide all of 9, 6 and rank 4 of layer: 1 would"):
        attach(linear((9, 6))[0], GraLoRA(rank=4))
    adapter = attach(linear((9, 6))[0], GraLoRA(rank=6, grid=4), clip_rank=True)
    assert adapter.sites["layer"].method.grid == 3  # type: ignore[attr-defined]


@every_shape
def test_delora(shape: Shape):
    def moved(left: Array, right: Array, strength: Array, w: Array) -> Array:
        total = np.zeros_like(w)
        for i in range(3):
            total += np.outer(left[:, i], right[i]) / np.linalg.norm(left[:, i]) / np.linalg.norm(right[i])
        return float(strength[0]) / 3 * total * np.linalg.norm(w, axis=0)

    def weight(f: dict[str, Array], w: Array) -> Array:
        return w + moved(f["L"], f["A"], f["strength"], w) - moved(f["L0"], f["A0"], np.array([5.0]), w)

    adapter, start, w = check(DeLoRA(rank=3, strength=5.0), shape, weight, 3 * sum(shape) + 1)
    near(start["strength"], [5.0])
    factors = adapter.sites["layer"].factors
    now = adapter.sites["layer"].method.now(factors).dense().detach().numpy()  # type: ignore[attr-defined]
    bound = abs(float(factors.strength.detach())) + 1e-9
    assert np.linalg.norm(now / np.linalg.norm(w, axis=0)) <= bound  # whatever the factors are


# -- starts from a gradient ---------------------------------------------------------------------------------------


@every_shape
def test_lora_sb(shape: Shape):
    calibration, g = seen(shape, "gradients")
    step = -0.01 * np.sign(g)
    u, s, vh = triplets(step, 3)

    def weight(f: dict[str, Array], w: Array) -> Array:
        return w + f["L"] @ f["C"] @ f["A"]

    _, start, _ = check(LoRASB(rank=3, eta=0.01), shape, weight, 9, calibration=calibration, targets=["layer"])
    assert np.abs(start["C"] - np.diag(s)).max() < 1e-6
    assert np.abs(start["L"] @ start["C"] @ start["A"] - (u * s) @ vh).max() < 1e-6


@every_shape
def test_lora_one(shape: Shape):
    calibration, g = seen(shape, "gradients")
    u, s, vh = triplets(-g, 3)
    scale = 16 / 3**0.5

    def weight(f: dict[str, Array], w: Array) -> Array:
        return w + scale * f["L"] @ f["A"]

    _, start, _ = check(LoRAOne(rank=3), shape, weight, 3 * sum(shape), calibration=calibration, targets=["layer"])
    assert np.abs(start["L"] @ start["A"] - (u * s / s[0] / 128) @ vh).max() < 1e-8
    near(np.linalg.norm(start["L"], axis=0), np.linalg.norm(start["A"], axis=1))
    assert abs(np.linalg.norm(scale * start["L"] @ start["A"], 2) - scale / 128) < 1e-7


def test_the_start_of_lora_one_and_lora_sb_lowers_the_loss():
    for method in (LoRAOne(rank=3), LoRASB(rank=3, eta=1e-3)):
        calibration, _ = seen((6, 9), "gradients")
        model, _, x = linear((6, 9))
        before = (output(model, x) ** 2).sum()
        attach(model, method, ["layer"], calibration=calibration)
        assert (output(model, x) ** 2).sum() < before


# -- steps --------------------------------------------------------------------------------------------------------


@every_shape
def test_lora_fa(shape: Shape):
    check(LoRAFA(rank=3), shape, lambda f, w: w + f["L"] @ f["A"], 3 * shape[0])
    for corrects in (True, False):
        model, w, x = linear(shape)
        adapter = attach(model, LoRAFA(rank=3, corrects=corrects))
        a = tensors(adapter)["A"]
        stepper = torch.optim.SGD(adapter.parameters(), lr=0.1)
        gradients(model, adapter, x)
        full = (3 * (x @ w.T) ** 2).T @ x  # of W0
        adapter.before_step(peak_lr=0.1)
        stepper.step()
        adapter.after_step()
        inverse = np.linalg.inv(a @ a.T) if corrects else EYE
        expected = -0.1 * full @ a.T @ inverse @ a
        assert np.abs(adapter.delta("layer").numpy() - expected).max() < 1e-6 * np.abs(expected).max()


@every_shape
def test_polar(shape: Shape):
    _, start, _ = check(
        PoLAR(rank=3, alpha=6), shape, lambda f, w: w + 2 * f["L"] @ f["C"] @ f["A"], 3 * (sum(shape) + 3)
    )
    assert not start["C"].any()
    near(start["L"].T @ start["L"], EYE)
    near(start["A"] @ start["A"].T, EYE)


@every_shape
def test_polar_lands(shape: Shape):
    """The field of the code, with its m×m matrices: (G Pᵀ − P Gᵀ) P + λ P (PᵀP − I)."""
    model, _, x = linear(shape)
    adapter = attach(model, PoLAR(rank=3, landing=0.3))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1)))
    before, f = gradients(model, adapter, x), tensors(adapter)
    adapter.before_step(peak_lr=0.1)
    factors = adapter.sites["layer"].factors
    for name in ("L", "A"):
        g, p = (before[name], f[name]) if name == "L" else (before[name].T, f[name].T)
        field = (g @ p.T - p @ g.T) @ p + 0.3 * p @ (p.T @ p - EYE)
        near(factors._parameters[name].grad, field if name == "L" else field.T)  # type: ignore[union-attr]
    near(factors.C.grad, before["C"])


@every_shape
def test_stella(shape: Shape):
    def weight(f: dict[str, Array], w: Array) -> Array:
        return w + 2 * (f["L"] @ f["C"] @ f["A"] - f["L0"] @ f["A0"])

    _, start, _ = check(StelLA(rank=3, alpha=6), shape, weight, 3 * (sum(shape) + 3))
    near(start["C"], EYE)
    near(start["L"].T @ start["L"], EYE)
    near(start["A"] @ start["A"].T, EYE)


@every_shape
def test_stella_stays_on_the_manifold(shape: Shape):
    """Three steps of the paper, one after the other; the polar factor by (X + Δ)(I + ΔᵀΔ)^−½."""
    model, _, x = linear(shape)
    adapter = attach(model, StelLA(rank=3))
    stepper = torch.optim.SGD(adapter.parameters(), lr=1e-3)
    for _ in range(3):
        stepper.zero_grad()
        g, f = gradients(model, adapter, x), tensors(adapter)
        adapter.before_step(peak_lr=1e-3)
        stepper.step()
        adapter.after_step()
        now = tensors(adapter)
        near(now["C"], f["C"] - 1e-3 * g["C"])
        for name in ("L", "A"):
            point, slope, found = (
                each[name] if name == "L" else each[name].T
                for each in (f, g, now)  # vectors as columns
            )
            step = -1e-3 * (slope - point @ slope.T @ point)
            inner = point.T @ step
            step = step - point @ (inner + inner.T) / 2
            values, vectors = np.linalg.eigh(EYE + step.T @ step)
            near(found, (point + step) @ (vectors / np.sqrt(values)) @ vectors.T)
            near(found.T @ found, EYE)
    assert not adapter.sites["layer"].factors.memory  # nothing of a step is kept


@every_shape
def test_oplora_keeps_the_leading_triplets(shape: Shape):
    _, start, w = check(
        OPLoRA(rank=3, alpha=6, protects=2), shape, lambda f, w: w + 2 * f["L"] @ f["A"], 3 * sum(shape)
    )
    u, s, vh = triplets(w, 2)
    near(start["A"] @ vh.T, np.zeros((3, 2)))
    model, _, x = linear(shape)
    adapter = attach(model, OPLoRA(rank=3, protects=2))
    stepper = torch.optim.Adam(adapter.parameters(), lr=0.1)
    for _ in range(3):
        stepper.zero_grad()
        gradients(model, adapter, x)
        adapter.before_step(peak_lr=0.1)
        stepper.step()
        adapter.after_step()
    new = w + adapter.delta("layer").numpy()
    assert np.abs(new - w).max() > 0.01
    near(new @ vh.T, u * s)
    near(u.T @ new, s[:, None] * vh)


def test_values_out_of_range_are_refused():
    for make, words in (
        (lambda: PoLAR(landing=-1.0), "landing"),
        (lambda: LoRASB(eta=0.0), "eta"),
        (lambda: LoRAOne(gamma=0.0), "gamma"),
        (lambda: OPLoRA(protects=0), "protects"),
        (lambda: DeLoRA(strength=0.0), "strength"),
        (lambda: LoKr(factor=0), "factor"),
        (lambda: GraLoRA(grid=0), "grid"),
        (lambda: Astra(end="middle"), "end"),  # type: ignore[arg-type]
        (lambda: NLoRA(sketch="svd"), "sketch"),  # type: ignore[arg-type]
        (lambda: NLoRA(only="L"), "only"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=words):
            make()
