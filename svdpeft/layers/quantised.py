"""Quantised weights: how bitsandbytes and torchao store them.

The one file that knows. Everybody else asks for ``weight``: the dequantised one, which is a plain one's own tensor.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from svdpeft.layers.cpu_layout import unpacked

LINEARS = ("bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt")  # called as nn.Linear is
OWN = (  # what these have beside an nn.Linear's attributes
    *("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu"),
    *("state", "index"),
)


class Form(NamedTuple):
    """How a layer stores a weight: all that can be put into the layer again.

    Args:
        cls: class of the layer.
        tensor: the parameter.
        own: what the class's instances have beside it.
    """

    cls: type
    tensor: Any
    own: dict[str, Any]

    @property
    def scheme(self) -> str | None:
        """What the weight is quantised by; ``None``: it is not, or in a way that is not known here."""
        return _store(self.tensor).scheme(self)

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight, however it is stored."""
        return self._by.shape(self)

    def values(self) -> Tensor:
        """Return the weight: the dequantised one, or a plain one's own tensor."""
        return self._by.values(self)

    def codes(self) -> Tensor:
        """Return what a weight is known by, in its shape: the integers of a quantised one, a plain one's own values.

        Scales are left out: bitsandbytes rounds those of 4 bits when a CPU evaluates.
        """
        return self._by.codes(self)

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes, its scales among them."""
        return sum(part.nbytes for part in self._by.parts(self))

    @property
    def _by(self) -> Plain:
        return Plain() if self.scheme is None else _store(self.tensor)


class Plain:
    """A tensor that is the weight; those derived from this are others."""

    def scheme(self, form: Form) -> str | None:
        """Return ``None`` as well where a tensor of the class is not quantised yet."""
        return None

    def shape(self, form: Form) -> torch.Size:
        return form.tensor.shape

    def values(self, form: Form) -> Tensor:
        return form.tensor

    def codes(self, form: Form) -> Tensor:
        return form.tensor

    def parts(self, form: Form) -> list[Tensor]:
        return [form.tensor]


class FourBit(Plain):
    """bitsandbytes' 4 bits, NF4 and FP4: two codes in a byte, and a scale for each 64 of them."""

    def scheme(self, form: Form) -> str | None:
        return None if form.tensor.quant_state is None else form.tensor.quant_type

    def shape(self, form: Form) -> torch.Size:
        return torch.Size(form.tensor.quant_state.shape)

    def values(self, form: Form) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(*unpacked(form.tensor))

    def codes(self, form: Form) -> Tensor:
        packed, shape = unpacked(form.tensor)[0].view(torch.uint8).flatten(), self.shape(form)
        return torch.stack([packed >> 4, packed & 15], -1).flatten()[: shape.numel()].view(shape)

    def parts(self, form: Form) -> list[Tensor]:
        return [form.tensor.data, form.tensor.quant_state.absmax]


class EightBit(Plain):
    """bitsandbytes' LLM.int8(): a row of integers and its largest value."""

    def scheme(self, form: Form) -> str | None:
        return "int8" if form.tensor.dtype == torch.int8 else None

    def values(self, form: Form) -> Tensor:
        scale = form.tensor.SCB
        scale = form.own["state"].SCB if scale is None else scale  # where the first forward has put it
        return form.tensor.detach().to(torch.float32) * scale.float().unsqueeze(1).mul(1 / 127)

    def parts(self, form: Form) -> list[Tensor]:
        return [form.tensor.data, form.tensor.SCB]


class TorchAO(Plain):
    """torchao's tensors, whatever is in them: they say themselves what they stand for."""

    def scheme(self, form: Form) -> str | None:
        return f"torchao {type(form.tensor).__name__}" if hasattr(form.tensor, "dequantize") else None

    def values(self, form: Form) -> Tensor:
        return form.tensor.detach().dequantize()

    def codes(self, form: Form) -> Tensor:
        codes = getattr(form.tensor, "qdata", None)
        return codes if isinstance(codes, Tensor) and codes.shape == form.tensor.shape else self.values(form)

    def parts(self, form: Form) -> list[Tensor]:
        return [getattr(form.tensor, name) for name in form.tensor.__tensor_flatten__()[0]]


def noted(tensor: Any) -> bool:
    """Whether bitsandbytes has noted on a tensor how it is quantised: that stays where torch pickles it, its class does
    not."""
    return hasattr(tensor, "quant_state") or hasattr(tensor, "SCB")


def _store(tensor: Any) -> Plain:
    if noted(tensor):
        return FourBit() if hasattr(tensor, "quant_state") else EightBit()
    return _by_class(type(tensor))


@functools.cache
def _by_class(cls: type) -> Plain:
    return TorchAO() if "torchao.utils.TorchAOBaseTensor" in _names(cls) else Plain()


def _names(cls: type) -> set[str]:
    return {f"{c.__module__}.{c.__qualname__}" for c in cls.__mro__}


@functools.cache
def of_library(cls: type) -> bool:
    """Whether a layer's class is one of bitsandbytes', or derived from one.

    What such a layer gives is a view made inside a custom autograd function, into which nothing is added in place.
    """
    return not _names(cls).isdisjoint(LINEARS)


def form_of(module: nn.Module, parameter: str) -> Form:
    """Return how a layer stores a weight now."""
    tensor = module._parameters.get(parameter)
    tensor = module._buffers[parameter] if tensor is None else tensor
    own = {name: vars(module)[name] for name in OWN if name in vars(module)} if noted(tensor) else {}
    return Form(type(module), tensor, own)


def weight(module: nn.Module, parameter: str) -> Tensor:
    """Return the weight of a layer, dequantised where it is stored so; a plain one's own parameter."""
    return form_of(module, parameter).values()


def scheme(module: nn.Module, parameter: str) -> str | None:
    """Return what the weight of a layer is quantised by, or ``None``."""
    return form_of(module, parameter).scheme
