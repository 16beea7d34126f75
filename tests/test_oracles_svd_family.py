"""SC-LoRA, DuDe and NoRA: their formulas in NumPy float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import equal_bits, perturb
from oracle import Array, check, every_shape, linear, near, output, rank_of, tensors, triplets
from torch import nn

from svdpeft import Calibration, DoRA, DuDe, NoRA, PiSSA, SCLoRA, attach, calibrate

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
