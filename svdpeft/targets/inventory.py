"""What a model has to adapt: every parameter that is a matrix or a batch of them, its kind, and who shares it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdpeft.layers import quantised
from svdpeft.layers.base import LayerKind
from svdpeft.methods.base import Factors
from svdpeft.registry import KINDS
from svdpeft.sites.place import is_factor


@dataclass(frozen=True)
class Weight:
    """A parameter with at least two axes.

    Args:
        name: of its layer, or of the parameter where the layer has several or is not known.
        kind: that adapts it; ``None`` for a raw parameter.
        head: whether it belongs to the output layer.
    """

    name: str
    module: nn.Module
    parameter: str
    kind: LayerKind | None
    head: bool
    roles: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What patterns may call it: its own name, its roles, and the parameter's full name."""
        return self.name, *self.roles, f"{self.name}.{self.parameter}".lstrip(".")

    @property
    def tensor(self) -> Tensor:
        """The parameter itself."""
        found = self.module._parameters[self.parameter]
        assert found is not None
        return found

    @property
    def scheme(self) -> str | None:
        """By what scheme it is quantised; ``None``: it is not, or in a way that is not known."""
        return quantised.scheme(self.module, self.parameter)

    @property
    def values(self) -> Tensor:
        """What it stands for: the dequantised weight, or the parameter itself."""
        return quantised.weight(self.module, self.parameter)

    @property
    def count(self) -> int:
        """Number of its values, however they are stored."""
        return quantised.form_of(self.module, self.parameter).shape.numel()


def kind_of(module: nn.Module, parameter: str = "weight") -> LayerKind | None:
    """Return the kind that adapts this parameter, or ``None``: of several, that of the nearest class."""
    if not isinstance(module._parameters.get(parameter), Tensor):
        return None
    found = [(distance, kind) for kind in KINDS.values() if (distance := kind.match(module, parameter)) is not None]
    return min(found, key=lambda pair: pair[0])[1]() if found else None


def weights_of(model: nn.Module) -> list[Weight]:
    """Return every parameter with two or more axes, in the order of the modules; one entry per use of a tied one."""
    heads = _output_layers(model)
    roles: dict[str, tuple[str, ...]] = {}
    for kind in KINDS.values():
        roles |= kind.roles(model)
    found: list[Weight] = []
    for name, module in model.named_modules():
        inside = isinstance(module, (Factors, nn.utils.parametrize.ParametrizationList))
        if inside or is_factor(name):
            continue
        for parameter, tensor in module._parameters.items():
            if tensor is None or isinstance(tensor, nn.UninitializedParameter) or tensor.ndim < 2:
                continue
            kind = kind_of(module, parameter)
            if kind is None and sum(size > 1 for size in tensor.shape) < 2:
                continue  # a vector with axes to broadcast along
            whole = kind is not None and parameter == kind.parameter
            full = name if whole else f"{name}.{parameter}".lstrip(".")
            found.append(Weight(full, module, parameter, kind, module in heads, roles.get(full, ())))
    return found


def by_identity(weights: Sequence[Weight]) -> dict[int, list[Weight]]:
    """Group the uses of each parameter: more than one means that it is tied."""
    users: dict[int, list[Weight]] = {}
    for weight in weights:
        users.setdefault(id(weight.tensor), []).append(weight)
    return users


def views(weights: Sequence[Weight]) -> dict[int, str]:
    """Parameters that share memory with another one: id -> the other's name."""
    spans: dict[int, dict[int, tuple[int, int, str]]] = {}
    for weight in weights:
        t = weight.tensor
        if type(t) is not nn.Parameter or t.layout is not torch.strided or t.is_meta or not t.numel():
            continue
        reach = 1 + sum((int(size) - 1) * int(step) for size, step in zip(t.shape, t.stride(), strict=True))
        start = int(t.storage_offset()) * t.element_size()
        span = (start, start + reach * t.element_size(), weight.name)
        spans.setdefault(t.untyped_storage().data_ptr(), {})[id(t)] = span
    found = {}
    for group in spans.values():
        widest: tuple[int, int, str] | None = None
        owner = 0
        for key, (start, stop, name) in sorted(group.items(), key=lambda item: item[1]):
            if widest is not None and start < widest[1]:
                found |= {owner: name, key: widest[2]}
            if widest is None or stop > widest[1]:
                widest, owner = (start, stop, name), key
    return found


def users_of_parameters(model: nn.Module) -> dict[int, list[tuple[str, str]]]:
    """Group the uses of every parameter by its identity, as (module, parameter): several means that it is tied."""
    users: dict[int, list[tuple[str, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((name, key))
    return users


def computes_without_gradient(module: nn.Module) -> bool:
    """Whether the layer's ``forward`` is decorated with ``torch.no_grad()``: a table that is not for training."""
    code = getattr(type(module).forward, "__code__", None)  # the decorator's wrapper, called after it or after itself
    return code is not None and code.co_name in ("no_grad", "inference_mode", "decorate_context")


HEADS = re.compile(r"(.*\.)?(score|classifier|qa_outputs|lm_head|seq_relationship|\w+_labels_classifier)")


def _output_layers(model: nn.Module) -> set[nn.Module]:
    """The layers that give what the task asks for: by the model's own words, by its sizes, or by their names.

    timm says ``get_classifier``, of several heads a tuple; transformers ``get_output_embeddings`` of a vocabulary. What
    transformers puts beside its ``base_model`` is a head if it has a row per label or token, or is called as heads are.
    """
    found: set[nn.Module] = set()
    for accessor in ("get_output_embeddings", "get_classifier"):
        ask: Callable[[], object] | None = getattr(model, accessor, None)
        heads = ask() if callable(ask) else None
        for head in heads if isinstance(heads, (tuple, list)) else [heads]:
            if isinstance(head, nn.Module):
                found |= set(head.modules())
    if callable(getattr(model, "get_classifier", None)):
        return found | {module for name, module in model.named_modules() if name.split(".")[0] == "aux_head"}
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module):
        return found  # what the layers of any other module are for it does not say
    inside = set(base.modules()) if base is not model else set()
    sizes = {getattr(getattr(model, "config", None), name, None) for name in ("num_labels", "vocab_size")}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if module in inside or weight is None or weight.ndim < 2:
            continue
        if HEADS.fullmatch(name) or (base is not model and weight.shape[0] in sizes):
            found.add(module)
    return found
