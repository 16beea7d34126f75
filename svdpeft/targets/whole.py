"""Which parameters of the base are trained whole."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from svdpeft.layers.quantised import scheme
from svdpeft.layers.quantising import quantised_in
from svdpeft.methods.base import Factors
from svdpeft.patterns import matches
from svdpeft.registry import near_miss


def trained_whole(model: nn.Module, patterns: Iterable[str]) -> dict[str, tuple[nn.Module, str]]:
    """Return the parameters that ``train=`` names, as name -> (owner, attribute).

    Raises:
        ValueError: a pattern names no parameter of floating point, or quantised ones alone.
    """
    quantised = {f"{name}.{key}".lstrip("."): scheme(module, key) for name, module, key in quantised_in(model)}
    factors = {id(p) for module in model.modules() if isinstance(module, Factors) for p in module.parameters()}
    plain = ((name, p) for name, p in model.named_parameters() if name not in quantised and p.is_floating_point())
    first = {id(p): name for name, p in plain if id(p) not in factors}
    parameters = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if id(p) in first}
    chosen: dict[str, tuple[nn.Module, str]] = {}
    for pattern in patterns:
        found = [name for name in parameters if any(matches(pattern, part) for part in _prefixes(name))]
        if not found:
            for name, how in quantised.items():
                if any(matches(pattern, part) for part in _prefixes(name)):
                    raise ValueError(f"train={pattern!r}: {name} is quantised ({how}), and integers have no gradient")
            leaves = {part for name in parameters for part in _prefixes(name)}
            raise ValueError(f"train={pattern!r} names no parameter: {near_miss(pattern, leaves)}")
        for name in dict.fromkeys(parameters[alias] for alias in found):  # a shared one under its first name
            owner, _, attribute = name.rpartition(".")
            chosen[name] = (model.get_submodule(owner), attribute)
    return chosen


def biases_of(model: nn.Module, layers: Iterable[nn.Module]) -> dict[str, tuple[nn.Module, str]]:
    """Return the biases of some layers, as ``trained_whole`` does.

    Raises:
        ValueError: none of them has one.
    """
    biases = {id(bias) for layer in layers if (bias := layer._parameters.get("bias")) is not None}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in biases]
    if not names:
        raise ValueError("bias=True: none of the adapted layers has a bias")
    return {name: (model.get_submodule(name.rpartition(".")[0]), "bias") for name in names}


def _prefixes(name: str) -> list[str]:
    """``a.b.c`` -> [``a``, ``a.b``, ``a.b.c``].

    Example:
        >>> _prefixes("head.fc.weight")
        ['head', 'head.fc', 'head.fc.weight']
    """
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
