"""Quantised weights: how bitsandbytes and torchao store them.

The one file that knows. Everybody else asks for ``weight``: the dequantised one, which is a plain one's own tensor.
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

LINEARS = ("bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt")  # called as nn.Linear is
OWN = (  # what these have beside an nn.Linear's attributes
    *("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu"),
    *("state", "index"),
)


class Form(NamedTuple):
    """How a layer stores a weight, and all that can be put into the layer again.

    Args:
        cls: class of the layer.
        tensor: the parameter.
        own: what the class's instances have beside it.
    """

    cls: type
    tensor: Tensor
    own: dict[str, Any]


class Store(ABC):
    """Abstract: how one library stores a weight."""

    tensor: ClassVar[str]  # dotted name of its tensors' class, so that the library need not be there

    @abstractmethod
    def scheme(self, form: Form) -> str | None:
        """Return what it is called, or ``None`` where the tensor is not quantised yet, or as nobody knows here."""

    @abstractmethod
    def values(self, form: Form) -> Tensor:
        """Return the dequantised weight."""

    @abstractmethod
    def codes(self, form: Form) -> Tensor:
        """Return the integers that are stored, in the shape of the weight."""

    def shape(self, form: Form) -> torch.Size:
        """Return the shape of the weight."""
        return form.tensor.shape


class FourBit(Store):
    """bitsandbytes' 4 bits, NF4 and FP4: two codes in a byte, and a scale for each 64 of them.

    A first evaluation without gradients lays them out anew on some CPUs, with the scales rounded to bfloat16.
    """

    tensor = "bitsandbytes.nn.modules.Params4bit"

    def scheme(self, form: Form) -> str | None:
        return None if getattr(form.tensor, "quant_state", None) is None else form.tensor.quant_type  # type: ignore[attr-defined]

    def shape(self, form: Form) -> torch.Size:
        return torch.Size(form.tensor.quant_state.shape)  # type: ignore[attr-defined]

    def values(self, form: Form) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(*_unpacked(form.tensor))

    def codes(self, form: Form) -> Tensor:
        packed = _unpacked(form.tensor)[0].view(torch.uint8).flatten()
        shape = self.shape(form)
        return torch.stack([packed >> 4, packed & 15], -1).flatten()[: shape.numel()].view(shape)


class EightBit(Store):
    """bitsandbytes' LLM.int8(): a row of integers and its largest value."""

    tensor = "bitsandbytes.nn.modules.Int8Params"

    def scheme(self, form: Form) -> str | None:
        return "int8" if form.tensor.dtype == torch.int8 else None

    def values(self, form: Form) -> Tensor:
        scale = form.tensor.SCB  # type: ignore[attr-defined]
        scale = form.own["state"].SCB if scale is None else scale  # where the first forward has put it
        return form.tensor.detach().to(torch.float32) * scale.float().unsqueeze(1).mul(1 / 127)

    def codes(self, form: Form) -> Tensor:
        return form.tensor.detach()


class TorchAO(Store):
    """torchao's tensors, whatever is in them: they say themselves what they stand for."""

    tensor = "torchao.utils.TorchAOBaseTensor"

    def scheme(self, form: Form) -> str | None:
        return f"torchao {type(form.tensor).__name__}" if hasattr(form.tensor, "dequantize") else None

    def values(self, form: Form) -> Tensor:
        return form.tensor.detach().dequantize()

    def codes(self, form: Form) -> Tensor:
        codes = getattr(form.tensor, "qdata", None)
        return codes if isinstance(codes, Tensor) and codes.shape == form.tensor.shape else self.values(form)


STORES = (FourBit(), EightBit(), TorchAO())


@functools.cache
def _store(cls: type) -> Store | None:
    names = {f"{c.__module__}.{c.__qualname__}" for c in cls.__mro__}
    return next((store for store in STORES if store.tensor in names), None)


def form_of(module: nn.Module, parameter: str) -> Form:
    """Return how a layer stores a weight now."""
    tensor = module._parameters.get(parameter)
    tensor = module._buffers[parameter] if tensor is None else tensor
    assert tensor is not None
    own = {name: vars(module)[name] for name in OWN if name in vars(module)} if of_library(type(module)) else {}
    return Form(type(module), tensor, own)


def scheme_of(form: Form) -> str | None:
    """Return the name of the scheme by which a weight is quantised; ``None``: it is not, or in an unknown way."""
    store = _store(type(form.tensor))
    return None if store is None else store.scheme(form)


def values(form: Form) -> Tensor:
    """Return the weight: the dequantised one, or a plain one's own tensor."""
    store = _store(type(form.tensor))
    return form.tensor if store is None or store.scheme(form) is None else store.values(form)


def codes(form: Form) -> Tensor:
    """Return what a weight is known by, in its shape: the integers of a quantised one, a plain one's own values.

    Scales are left out: bitsandbytes rounds those of 4 bits when a CPU evaluates.
    """
    store = _store(type(form.tensor))
    return form.tensor if store is None or store.scheme(form) is None else store.codes(form)


def shape_of(form: Form) -> torch.Size:
    """Return the shape of the weight, however it is stored."""
    store = _store(type(form.tensor))
    return form.tensor.shape if store is None or store.scheme(form) is None else store.shape(form)


def weight(module: nn.Module, parameter: str) -> Tensor:
    """Return the weight of a layer, dequantised where it is stored so; a plain one's own parameter."""
    return values(form_of(module, parameter))


def scheme(module: nn.Module, parameter: str) -> str | None:
    """Return the name of the scheme by which the weight of a layer is quantised, or ``None``."""
    return scheme_of(form_of(module, parameter))


def refuses_in_place(module: nn.Module) -> bool:
    """Whether the layer's output is a view made inside a custom autograd function, which nothing is added into."""
    return of_library(type(module))


def quantised_in(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, str]]:
    """Yield the quantised weights of a model: name of the layer, the layer, name of the parameter, scheme."""
    for name, module in model.named_modules():
        for parameter, tensor in module._parameters.items():
            if tensor is not None and (found := scheme(module, parameter)) is not None:
                yield name, module, parameter, found


# -- bitsandbytes' layout for a CPU's kernel ------------------------------------------------------------------------


def pass_gradients(model: nn.Module) -> None:
    """Take back the layout that bitsandbytes gives 4-bit weights for a CPU's kernel, which has no gradient.

    An evaluation without gradients makes it, and nothing else undoes it: the training that follows would stop, or
    silently have no gradient in the layers below.
    """
    for module in model.modules():
        tensor: Any = module._parameters.get("weight")
        if getattr(getattr(tensor, "quant_state", None), "packing_format_for_cpu", False):
            tensor.data, state = _unpacked(tensor)
            vars(tensor.quant_state).update(vars(state))  # which others hold, too


def may_lose_gradients(model: nn.Module) -> bool:
    """Whether a layer of the model may come to have that layout."""
    return any(vars(module).get("support_avx512bf16_for_cpu", False) for module in model.modules())


def _unpacked(tensor: Any) -> tuple[Tensor, Any]:
    """A 4-bit weight in the layout in which it is dequantised and saved, with its state."""
    state = tensor.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return tensor.data, state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    scales, state = state.absmax, copy.copy(state)
    state.original_nested = False  # the scales are no longer quantised themselves, and need not be again
    data, state = _convert_weight_packed_for_cpu_inverse(tensor.data, state)
    state.absmax = scales.T.reshape(-1).float()  # theirs leaves them transposed
    return data, state


def of_library(cls: type) -> bool:
    """Whether a layer's class is one of bitsandbytes', or derived from one."""
    return any(f"{c.__module__}.{c.__qualname__}" in LINEARS for c in cls.__mro__)
