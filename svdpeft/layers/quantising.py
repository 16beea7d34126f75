"""From one form of storing a linear layer's weight to another: quantised by a scheme, or plain again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdpeft.layers.quantised import OWN, Form, form_of, of_library, values
from svdpeft.registry import near_miss

BLOCK, ROWS = 64, 32  # of bitsandbytes' 4 bits: values with one scale; rows of which its CPU kernel takes a multiple


def put(module: nn.Module, parameter: str, form: Form) -> None:
    """Let a layer store a weight in another form. Its bias, hooks and children stay."""
    if of_library(type(module)):
        for name in OWN:
            vars(module).pop(name, None)
    vars(module).update(form.own)
    if hasattr(form.tensor, "quant_state"):
        form.tensor.module = module  # type: ignore[attr-defined]
    module._parameters[parameter] = form.tensor  # type: ignore[assignment]
    module.__class__ = form.cls


def plain(form: Form, dtype: torch.dtype) -> Form:
    """The same weight dequantised, in a layer of torch's own."""
    tensor = nn.Parameter(values(form).detach().to(dtype, copy=True), requires_grad=False)
    return Form(nn.Linear if of_library(form.cls) else form.cls, tensor, {})


@dataclass(frozen=True)
class Scheme:
    """How ``quantize`` stores a weight.

    Args:
        library: that does it.
        options: of its layer, or of its configuration.
    """

    library: str
    options: tuple[tuple[str, Any], ...] = ()


SCHEMES = {
    "nf4": Scheme("bitsandbytes", (("quant_type", "nf4"),)),
    "fp4": Scheme("bitsandbytes", (("quant_type", "fp4"),)),
    "int8": Scheme("bitsandbytes", (("threshold", 6.0), ("has_fp16_weights", False))),  # as published for LLM.int8()
    "torchao-int8": Scheme("torchao"),
    "torchao-int4": Scheme("torchao", (("group", 32),)),
}


def check_scheme(name: str) -> None:
    """Refuse a scheme that does not exist, or whose library is not there.

    Raises:
        ValueError: no scheme is called so.
        ImportError: its library is not installed.
    """
    if name not in SCHEMES:
        raise ValueError(f"scheme {name!r}: {near_miss(str(name), SCHEMES)}")
    library = SCHEMES[name].library
    try:
        __import__(library)
    except ImportError as error:
        raise ImportError(f"scheme {name!r} needs {library}: pip install 'svdpeft[quantised]'") from error


def quantised(w: Tensor, name: str) -> Form:
    """Quantise the weight of an ``nn.Linear``.

    Args:
        w: (out, in), of the dtype that it is to be dequantised to.
        name: of the scheme.
    """
    scheme, (m, n) = SCHEMES[name], w.shape
    options = dict(scheme.options)
    layer: Any
    if scheme.library == "torchao":
        layer = nn.Linear(n, m, bias=False, device="meta")
        layer.weight = nn.Parameter(w.detach().clone(), requires_grad=False)
        _by_torchao(layer, options.get("group"))
        return Form(nn.Linear, layer._parameters["weight"], {})
    import bitsandbytes

    if "quant_type" in options:
        layer = bitsandbytes.nn.Linear4bit(n, m, bias=False, compress_statistics=False, device="meta", **options)
        if m % ROWS or n % BLOCK:
            layer.support_avx512bf16_for_cpu = False  # its kernel stops at other sizes
        made = bitsandbytes.nn.Params4bit
        tensor = made(w.detach().clone(), compress_statistics=False, module=layer, **options)
    else:
        layer = bitsandbytes.nn.Linear8bitLt(n, m, bias=False, device="meta", **options)
        tensor = bitsandbytes.nn.Int8Params(w.detach().clone(), requires_grad=False)
    layer.weight = tensor.to(w.device)
    return form_of(layer, "weight")


def _by_torchao(layer: nn.Module, group: int | None) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    n = layer.weight.shape[1]
    if group is not None and n % group:
        raise ValueError(f"torchao-int4 has a scale for each {group} values of a row, and {n} is no multiple of that")
    intx = group and IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group))
    quantize_(layer, intx or Int8WeightOnlyConfig(), filter_fn=lambda *_: True)
