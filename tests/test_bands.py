"""A banded core is applied and differentiated entry by entry; its slow twins: the dense matrix and plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import close, perturb
from torch import Tensor, nn

from svdpeft import SVFT, attach
from svdpeft.decomposition import Band, Product, band_count, band_index, scatter_core
from svdpeft.decomposition.bands import _in_one_pass, across

SIZES = [(7, 2), (5, 1), (4, 9), (5, 0), (1, 3)]  # r, d; also a band that is wider than the matrix


def randn(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=SIZES, ids=lambda size: f"r{size[0]}-d{size[1]}")
def core(request) -> tuple[Band, Tensor]:
    """A band, and the matrix of the same values."""
    r, d = request.param
    values, index = randn(band_count(r, d)), band_index(r, d)
    return Band.of(values, index, r, d), scatter_core(values, index, r)


def test_a_band_is_the_matrix_of_its_entries(core: tuple[Band, Tensor]):
    band, matrix = core
    r = len(matrix)
    assert torch.equal(band.matrix(), matrix)
    assert torch.equal(band.abs().matrix(), matrix.abs())
    assert band.to(torch.float32).diagonals.dtype == torch.float32
    close(band.plus(randn(r)).matrix(), matrix + randn(r).diag())
    z, left, right = randn(2, 3, r), randn(6, r), randn(r, 4)
    with torch.no_grad():
        close(band.through(z), z @ matrix.mT)
        close(band.through(z.expand(999, 2, 3, r)), (z @ matrix.mT).expand(999, 2, 3, r))
    close(band.through(z), z @ matrix.mT)
    close(Product(left, band, right, 0.5).dense(), left @ matrix @ right * 0.5)


def test_a_batch_of_bands():
    values, index = randn(3, band_count(6, 1)), band_index(6, 1)
    band, matrices = Band.of(values, index, 6, 1), scatter_core(values, index, 6)
    assert torch.equal(band.matrix(), matrices)
    close(band.after(randn(3, 5, 6)), randn(3, 5, 6) @ matrices)
    close(band.plus(randn(3, 6)).matrix(), matrices + torch.diag_embed(randn(3, 6)))


@pytest.mark.parametrize("back", [False, True])
def test_gradients_of_both_orders(core: tuple[Band, Tensor], back: bool):
    diagonals, z = core[0].diagonals.requires_grad_(), randn(2, 3, len(core[1])).requires_grad_()
    assert torch.autograd.gradcheck(lambda c, x: across(c, x, back), (diagonals, z))
    assert torch.autograd.gradgradcheck(lambda c, x: across(c, x, back), (diagonals, z))


@pytest.mark.parametrize("back", [False, True])
def test_the_slow_twin_has_the_same_values_and_gradients(core: tuple[Band, Tensor], back: bool):
    diagonals, z = core[0].diagonals.requires_grad_(), randn(2, 3, len(core[1])).requires_grad_()
    found, expected = across(diagonals, z, back), _in_one_pass(diagonals, z, back)
    close(found, expected)
    up = randn(*found.shape)
    for one, other in zip(
        torch.autograd.grad(found, (diagonals, z), up), torch.autograd.grad(expected, (diagonals, z), up), strict=True
    ):
        close(one, other)


def test_per_example_gradients():
    values, index, x = randn(band_count(5, 1)), band_index(5, 1), randn(4, 3, 5)

    def loss(values: Tensor, x: Tensor) -> Tensor:
        return Band.of(values, index, 5, 1).through(x).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    close(found, torch.stack([torch.func.grad(loss)(values, each) for each in x]))
    several = torch.stack([values, 2 * values])  # and cores of which each sees all examples
    found = torch.func.grad(lambda v: torch.func.vmap(loss, in_dims=(0, None))(v, x).sum())(several)
    close(found, torch.stack([torch.func.grad(loss)(each, x) for each in several]))


def layer(fold: bool) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 9, bias=False), nn.Linear(9, 7, bias=False)).double()
    adapter = attach(model, SVFT(pattern="banded", off_diagonals=1))
    perturb(adapter)
    if fold:
        adapter.fold()
    for site in adapter.sites.values():
        site.dense = False
    return model, torch.randn(2, 3, 9, dtype=torch.float64)


@pytest.mark.parametrize("fold", [False, True], ids=["attached", "folded"])
def test_a_layer_beside_the_dense_core(fold: bool):
    """With plain autograd over U M Vᵀ, built: the same outputs and gradients, of the input as well."""
    model, x = layer(fold)
    x.requires_grad_()
    trains = [p for p in model.parameters() if p.requires_grad]
    out = model(x)
    found = torch.autograd.grad(out.square().sum(), [x, *trains])
    y = x
    for linear in model:
        linear: Any
        (factors,) = linear.svdpeft.children()
        m = scatter_core(factors.C, factors.index, len(factors.sigma))
        y = y @ (linear._parameters["weight"] + factors.L @ m @ factors.A).mT
    close(out, y)
    for one, other in zip(found, torch.autograd.grad(y.square().sum(), [x, *trains]), strict=True):
        close(one, other)


@pytest.mark.parametrize("fold", [False, True], ids=["attached", "folded"])
def test_compiled_as_one_graph(fold: bool):
    torch.compiler.reset()
    model, x = layer(fold)
    trains = [p for p in model.parameters() if p.requires_grad]
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(x), expected)
    for one, other in zip(
        torch.autograd.grad(compiled(x).square().sum(), trains),
        torch.autograd.grad(expected.square().sum(), trains),
        strict=True,
    ):
        close(one, other)


def test_only_the_band_is_kept_for_the_backward():
    """No matrix of the core, and of the size of the tokens z alone: what recomputation could not spare."""
    model, x = layer(False)
    x.requires_grad_()
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        model[0](x)
    own = {p.data_ptr() for p in model.parameters()} | {b.data_ptr() for b in model.buffers()}
    made = sorted(tuple(t.shape) for at, t in kept.items() if at not in own)
    assert made == [(2, 3, 9), (3, 9), (25,)], made  # z, the diagonals, where its entries are among them
