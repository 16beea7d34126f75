"""From one form of storing a linear layer's weight to another: quantised by a scheme, or plain again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from svdpeft.layers.quantised import OWN, Form, form_of, of_library, scheme
from svdpeft.registry import near_miss

BLOCK, ROWS = 64, 32  # of bitsandbytes' 4 bits: values with one scale; rows of which its CPU kernel takes a multiple
GROUP = 32  # values with one scale of torchao's 4 bits


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
    tensor = nn.Parameter(form.values().detach().to(dtype, copy=True), requires_grad=False)
    return Form(nn.Linear if of_library(form.cls) else form.cls, tensor, {})


def quantised_in(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the quantised weights of a model: name of the layer, the layer, name of the parameter."""
    for name, module in model.named_modules():
        for parameter, tensor in module._parameters.items():
            if tensor is not None and scheme(module, parameter) is not None:
                yield name, module, parameter


def values_in(model: nn.Module) -> int:
    """Return the number of values of a model's parameters, however they are stored; of a shared one once."""
    found = {
        id(t): form_of(m, key).shape.numel()
        for m in model.modules()
        for key, t in m._parameters.items()
        if t is not None
    }
    return sum(found.values())


def _four_bits(kind: str, w: Tensor) -> Form:
    from bitsandbytes.nn import Linear4bit, Params4bit

    m, n = w.shape
    layer: Any = Linear4bit(n, m, bias=False, compress_statistics=False, quant_type=kind, device="meta")
    if m % ROWS or n % BLOCK:
        layer.support_avx512bf16_for_cpu = False  # its kernel stops at other sizes
    made: Any = Params4bit  # pyright takes it for its base
    layer.weight = made(w.clone(), compress_statistics=False, quant_type=kind, module=layer).to(w.device)
    return form_of(layer, "weight")


def _eight_bits(w: Tensor) -> Form:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    m, n = w.shape  # and the threshold as published for LLM.int8()
    layer: Any = Linear8bitLt(n, m, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
    made: Any = Int8Params
    layer.weight = made(w.clone(), requires_grad=False).to(w.device)
    return form_of(layer, "weight")


def _by_torchao(dtype: str, w: Tensor) -> Form:
    from torchao.quantization import quantize_

    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.weight = nn.Parameter(w.clone(), requires_grad=False)
    quantize_(layer, _torchao_config(dtype), filter_fn=lambda *_: True)
    return form_of(layer, "weight")


def _torchao_config(dtype: str) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(getattr(torch, dtype), PerGroup(GROUP)) if dtype == "int4" else Int8WeightOnlyConfig()


Make = Callable[[Tensor], Form]
SCHEMES: dict[str, tuple[str, Make]] = {  # by name: the library, and what quantises a weight (out, in)
    "nf4": ("bitsandbytes", partial(_four_bits, "nf4")),
    "fp4": ("bitsandbytes", partial(_four_bits, "fp4")),
    "int8": ("bitsandbytes", _eight_bits),
    "torchao-int8": ("torchao", partial(_by_torchao, "int8")),
    "torchao-int4": ("torchao", partial(_by_torchao, "int4")),
}


def scheme_named(name: str) -> Make:
    """Return what quantises the detached weight of an ``nn.Linear``, which has its dtype when it is dequantised.

    Raises:
        ValueError: no scheme is called so.
        ImportError: its library is not installed.

    Example:
        >>> form = scheme_named("nf4")(torch.randn(32, 64))
        >>> form.scheme, form.shape, form.tensor.shape
        ('nf4', torch.Size([32, 64]), torch.Size([1024, 1]))
    """
    if name not in SCHEMES:
        raise ValueError(f"scheme {name!r}: {near_miss(str(name), SCHEMES)}")
    library, make = SCHEMES[name]
    if find_spec(library) is None:
        raise ImportError(f"scheme {name!r} needs {library}: pip install 'svdpeft[quantised]'")
    return make


def transformers_config(name: str, dtype: torch.dtype, left: Sequence[str]) -> Any:
    """Return what a folder of transformers says of a model whose layers a scheme has quantised.

    Args:
        name: of the scheme.
        dtype: in which it computes.
        left: names of the linear layers that are not quantised.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if SCHEMES[name][0] == "torchao":
        return TorchAoConfig(_torchao_config(name.removeprefix("torchao-")), modules_to_not_convert=list(left))
    how: dict[str, Any] = (
        {"load_in_8bit": True} if name == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": name}
    )
    return BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=list(left))
