"""What authors of methods and kinds read: the extension API is described, and arguments are described once."""

from __future__ import annotations

import inspect

import pytest

from svdpeft import SORSA, SVFT, LoRA, PiSSA
from svdpeft.layers.base import CalledKind, LayerKind
from svdpeft.methods.base import Call, Factored, Given, Hooks, Method, PerSite, Transform
from svdpeft.methods.base.docstrings import entries

CLASSES = (Method, Hooks, PerSite, Factored, Transform, Given, Call, LayerKind, CalledKind)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_extension_api_is_described_and_has_an_example(cls):
    assert ">>> " in (cls.__doc__ or "") or any(
        ">>> " in (inspect.getdoc(member) or "") for member in vars(cls).values()
    ), f"{cls.__name__} has no example"
    for name, member in vars(cls).items():
        if not name.startswith("_") and (callable(member) or isinstance(member, (property, classmethod))):
            assert inspect.getdoc(getattr(cls, name)), f"{cls.__name__}.{name} says nothing"


def args(cls: type) -> dict[str, list[str]]:
    return entries((cls.__doc__ or "").split("\n"))


@pytest.mark.parametrize("cls", [LoRA, PiSSA, SORSA, SVFT])
def test_a_method_takes_over_the_arguments_of_its_bases_in_the_order_of_its_fields(cls):
    assert list(args(cls)) == list(inspect.signature(cls).parameters)


def test_the_own_words_of_a_method_win():
    assert "σ is never divided by s" in " ".join(args(SORSA)["alpha"])
    assert args(LoRA)["dropout"] == args(SVFT)["dropout"] == ["    dropout: probability with which an entry of the "
    "adapter's input is dropped in training."]  # fmt: skip
