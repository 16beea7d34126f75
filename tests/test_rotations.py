"""Rotations from skew-symmetric matrices, against NumPy and against their own laws."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from oracle import Array, near
from torch import Tensor

from svdpeft.decomposition import (
    cayley,
    cayley_neumann,
    cayley_neumann_offset,
    cayley_offset,
    skew,
    skew_count,
)

Rotation = Callable[[Tensor], Tensor]
OFFSETS = {"cayley": cayley_offset, **{f"neumann{k}": lambda q, k=k: cayley_neumann_offset(q, k) for k in (0, 1, 2, 5)}}
every_offset = pytest.mark.parametrize("name", OFFSETS)


def drawn(*shape: int, size: float = 0.3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(*shape, generator=generator, dtype=torch.float64)


def expected(name: str, q: Array) -> Array:
    """R − I of one matrix, written out."""
    eye = np.eye(len(q))
    if name == "cayley":
        return (eye + q) @ np.linalg.inv(eye - q) - eye
    series = sum(np.linalg.matrix_power(q, p) for p in range(int(name.removeprefix("neumann")) + 1))
    return (eye + q) @ series - eye


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_skew_holds_each_value_once_below_the_diagonal(size: int):
    values = drawn(2, 4, skew_count(size))
    q = skew(values, size)
    assert q.shape == (2, 4, size, size)
    assert torch.equal(q, -q.mT)
    i, j = np.tril_indices(size, -1)
    near(q[..., i, j], values.numpy())


def test_skew_passes_its_gradient_to_both_triangles():
    values = drawn(3, 6).requires_grad_()
    weight = drawn(3, 4, 4, seed=1)
    (skew(values, 4) * weight).sum().backward()
    i, j = np.tril_indices(4, -1)
    near(values.grad, (weight - weight.mT)[..., i, j].numpy())


@every_offset
@pytest.mark.parametrize("size", [1, 2, 5])
def test_offset_is_the_rotation_without_the_identity(name: str, size: int):
    q = skew(drawn(2, 3, skew_count(size)), size)
    found = OFFSETS[name](q)
    for i in np.ndindex(2, 3):
        near(found[i], expected(name, q[i].numpy()))


def test_rotations_are_identity_and_offset():
    q = skew(drawn(4, 6), 4)
    near(cayley(q) - torch.eye(4), cayley_offset(q).numpy())
    near(cayley_neumann(q, 3) - torch.eye(4), cayley_neumann_offset(q, 3).numpy())


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_cayley_is_a_rotation_and_turns_back_with_the_sign(size: float):
    q = skew(drawn(3, 10, size=size), 5)
    r, back, eye = cayley(q), cayley(-q), torch.eye(5, dtype=torch.float64).expand(3, 5, 5)
    torch.testing.assert_close(r.mT @ r, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(back, r.mT, rtol=0, atol=1e-12)


def test_cayley_of_one_value_turns_by_twice_its_arctangent():
    value = torch.tensor([0.4], dtype=torch.float64)
    r, angle = cayley(skew(value, 2)), 2 * np.arctan(0.4)
    near(r, np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]))


def test_neumann_tends_to_cayley():
    q = skew(drawn(6, size=0.1), 4)
    errors = [float((cayley_neumann(q, k) - cayley(q)).abs().max()) for k in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-8


@every_offset
def test_offset_is_exactly_zero_at_zero(name: str):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = OFFSETS[name](torch.zeros(2, 3, 3, dtype=dtype))
        assert found.dtype == dtype
        assert bool((found == 0).all())


@every_offset
def test_offset_keeps_the_digits_of_a_small_rotation(name: str):
    """Where R − I was formed by a subtraction, float32 would leave one digit of 1e-7, and none of 1e-9."""
    q = skew(drawn(6, size=1e-9), 4)
    found = OFFSETS[name](q.float()).double()
    torch.testing.assert_close(found, OFFSETS[name](q), rtol=1e-6, atol=1e-15)


@every_offset
def test_offset_has_the_gradient_of_its_output(name: str):
    values = drawn(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: OFFSETS[name](skew(v, 4)), (values,))
    assert torch.autograd.gradcheck(
        lambda v: OFFSETS[name](skew(v, 4)), (torch.zeros_like(values, requires_grad=True),)
    )


@every_offset
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offset_is_computed_in_float32_at_least(name: str, dtype: torch.dtype):
    q = skew(drawn(10), 5).to(dtype)
    wide = OFFSETS[name](q.double())
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = OFFSETS[name](q)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wide, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@every_offset
def test_offset_compiles_whole(name: str):
    torch.compiler.reset()
    values = drawn(2, 6).requires_grad_()

    def turn(v: Tensor) -> Tensor:
        return OFFSETS[name](skew(v, 4))

    (gradient,) = torch.autograd.grad(turn(values).square().sum(), values)
    compiled = torch.compile(turn, fullgraph=True, backend="aot_eager")
    near(compiled(values), turn(values).detach().numpy())
    near(torch.autograd.grad(compiled(values).square().sum(), values)[0], gradient.numpy())
