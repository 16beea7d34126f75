"""The checker of shapes (shapes.py) is on in every test run, and refuses what an annotation rules out."""

import subprocess
import sys

import pytest
import torch
from jaxtyping import TypeCheckError
from shapes import held
from torch import nn

import svdpeft
from svdpeft.decomposition import SVD, Product, cayley, kmeans, scatter_core
from svdpeft.layers.linear import Linear


def test_a_core_function_refuses_another_shape():
    with pytest.raises(TypeCheckError, match="cayley"):
        cayley(torch.zeros(2, 3))
    with pytest.raises(TypeCheckError, match="kmeans"):
        kmeans(torch.zeros(5), clusters=2)
    with pytest.raises(TypeCheckError, match="scatter_core"):
        scatter_core(torch.zeros(2), torch.zeros(3, dtype=torch.int64), rank=2)


def test_what_was_right_once_does_not_let_another_shape_pass():
    for _ in range(2):
        cayley(torch.zeros(2, 2))
    with pytest.raises(TypeCheckError, match="cayley"):
        cayley(torch.zeros(3, 2))


def test_named_tuples_are_held_to_their_fields():
    with pytest.raises(TypeCheckError, match="parameter 'A'"):
        Product(torch.zeros(5, 2), None, torch.zeros(3, 4))
    with pytest.raises(TypeCheckError):
        SVD(torch.zeros(5, 2), torch.zeros(3), torch.zeros(2, 4))


def test_named_tuples_are_not_held_to_their_fields_while_torch_compiles():
    def product(L, A):
        return Product(L, None, A).L @ Product(L, None, A).A

    torch.compiler.reset()
    L, A = torch.ones(5, 2), torch.ones(2, 4)
    assert torch.equal(torch.compile(product, fullgraph=True, backend="eager")(L, A), L @ A)
    for wrong in ("A", [A], A.numpy()):  # anything else in the place of a tensor is still refused
        with pytest.raises(TypeCheckError, match="parameter 'A'"):
            Product(L, None, wrong)


def test_a_kind_is_held_to_what_it_overrides():
    with pytest.raises(TypeCheckError, match="from_matrix"):
        Linear().from_matrix(nn.Linear(2, 3), torch.zeros(3))


def test_a_transposition_in_a_start_is_caught():
    class Turned(svdpeft.PiSSA):
        def start(self, w, given):
            tensors = super().start(w, given)
            return {**tensors, "L": tensors["L"].mT.contiguous()}

    class TurnedWeight(svdpeft.PiSSA):
        def start(self, w, given):
            return super().start(w.mT, given)

    with pytest.raises(TypeCheckError):
        svdpeft.attach(nn.ModuleDict({"layer": nn.Linear(5, 4)}), Turned(rank=2), ["layer"])
    adapter = svdpeft.attach(nn.ModuleDict({"layer": nn.Linear(5, 4)}), TurnedWeight(rank=2), ["layer"])
    with pytest.raises(TypeCheckError, match=r"Site\.matrix"):
        adapter.delta("layer")


def test_what_was_right_of_one_object_does_not_let_another_pass():
    """The sizes that an annotation takes from self are looked at in every call."""
    adapter = svdpeft.attach(nn.ModuleDict({"layer": nn.Linear(5, 4)}), svdpeft.PiSSA(rank=2), ["layer"])
    site = adapter.sites["layer"]
    for _ in range(2):
        site.matrix()
    site.shape = (1, 5, 4)
    with pytest.raises(TypeCheckError, match=r"Site\.matrix"):
        site.matrix()


def test_an_override_in_a_test_can_be_held_to_the_contract():
    @held
    class Wrong(svdpeft.PiSSA):
        def absolute(self, f, w0):
            return w0.mT

    with pytest.raises(TypeCheckError, match="absolute"):
        Wrong().absolute(None, torch.zeros(2, 3))


def test_nothing_is_checked_outside_of_the_test_run():
    code = (
        "import sys, torch; from svdpeft.decomposition import Product;"
        "Product(torch.zeros(5, 2), None, torch.zeros(3, 4)); print('beartype' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "False"
