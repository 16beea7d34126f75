"""The layer kinds by themselves: their matrix view, and three ways of a called layer to one output."""

from __future__ import annotations

import pytest
import torch
from helpers import adapt, close, equal_bits, example, host, weight_of, weights_of
from rows import QUANTISED, QUESTIONS, Kind, asked, every_called, every_kind, kinds, methods, of_each_kind
from torch import Tensor, nn

from svdpeft import LoRA
from svdpeft.decomposition import Product
from svdpeft.layers.quantised import weight
from svdpeft.registry import KINDS, METHODS


def test_every_registered_method_and_kind_has_rows():
    assert {m.name for m in methods()} == {name for name in METHODS if not getattr(METHODS[name], "pairs", ())}
    assert {kind[0] for kind in kinds() if kind not in QUANTISED} == set(KINDS)


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_is_asked_in_turn_is_asked_of_every_method_and_of_every_kind(question: str):
    found = asked(question)
    assert {m.name for m, _ in found} == {m.name for m, _ in of_each_kind()}
    assert {kind[0] for _, kind in found} == {kind[0] for kind in kinds()}


def test_examples_show_matrices_that_are_not_square():
    for name in KINDS:
        shapes = set()
        for kind in (kind for kind in kinds() if kind[0] == name):
            model, _ = host(kind)
            shapes |= {site.shape[1:] for site in adapt(model, LoRA(rank=1)).sites.values()}
        assert any(m != n for m, n in shapes), f"{name} is {shapes}: a transposition would pass unseen"


@every_called
@pytest.mark.parametrize("core", ["none", "diagonal", "matrix"])
def test_apply_equals_the_layer_with_the_dense_update(kind: Kind, core: str):
    found, layer, x = example(kind)
    w = weight(layer, "weight").detach()
    *batch, m, n = found.to_matrix(layer, w).shape
    r = min(m, n) + 1  # a product may have more columns than the matrix has rows
    shapes = {"none": None, "diagonal": (*batch, r), "matrix": (*batch, r, r)}
    c = None if shapes[core] is None else torch.randn(shapes[core], dtype=w.dtype)  # type: ignore[arg-type]
    left, right = torch.randn(*batch, m, r, dtype=w.dtype), torch.randn(*batch, r, n, dtype=w.dtype)
    product = Product(left, c, right, scale=-1.7)
    delta = found.from_matrix(layer, product.dense())
    expected = found.run(layer, x, delta)
    close(found.apply(layer, x, product), expected)
    base = layer(x).detach()
    close(found.add(layer, x, base.clone(), product), base + expected)
    close(found.add_matrix(layer, x, base.clone(), product.dense()), base + expected)
    close(found.add_bias(layer, found.run(layer, x, w)), base)
    if core != "none":  # the dense form itself, without the library
        full = torch.diag_embed(c) if core == "diagonal" else c
        close(product.dense(), -1.7 * torch.einsum("...mr,...rs,...sn->...mn", product.L, full, product.A))
    out = base.clone()
    assert found.add(layer, x, out, product).data_ptr() == out.data_ptr(), "in place"


@every_kind
def test_matrix_view_round_trips(kind: Kind):
    """A site's matrices are its weight, and the sites of one weight are all of it, each entry once."""
    model, _ = host(kind)
    adapter = adapt(model, LoRA(rank=1))
    whole: dict[str, Tensor] = {}
    for site in adapter.sites.values():
        layer, kind_, name = site.places[0].module, site.kind, weight_of(model, site)
        w = weight(layer, site.places[0].parameter).detach()
        matrix = kind_.to_matrix(layer, w)
        assert matrix.shape[-2:] == site.shape[1:]
        whole[name] = whole.get(name, 0) + kind_.from_matrix(layer, matrix)
        other = torch.randn(matrix.shape, dtype=w.dtype)
        assert equal_bits(kind_.to_matrix(layer, kind_.from_matrix(layer, other)), other)
    for name, w in whole.items():
        assert equal_bits(w, weights_of(model, adapter)[name])


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conv_matrix_acts_on_the_flattened_patch(groups: int, dims: int):
    """With the kernel as large as the input a convolution is one matrix product per group."""
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    space = (2, 3, 4)[:dims]
    layer = conv(6, 12, space, groups=groups, bias=False, dtype=torch.float64)
    matrix = KINDS["conv"]().to_matrix(layer, layer.weight.detach())
    x = torch.randn(5, 6, *space, dtype=torch.float64)
    by_group = x.reshape(5, groups, -1)
    close(layer(x).detach().reshape(5, groups, -1), torch.einsum("goi,ngi->ngo", matrix, by_group))


def test_linear_matrix_is_the_weight_and_the_transposed_one_of_gpt2():
    for kind in (("linear", 0), ("hf-conv1d", 0)):
        found, layer, x = example(kind)
        matrix = found.to_matrix(layer, layer.weight.detach())
        close(layer(x).detach(), x @ matrix.T + layer.bias.detach())
