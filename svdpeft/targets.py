"""From words to sites: which layers of a model are adapted, which are trained whole, and why the rest is left.

Patterns mean the same everywhere (targets, exclude, train, rank): a name, a suffix of whole dotted parts, or a
regular expression that matches the whole name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from svdpeft.layers.base import LayerKind
from svdpeft.methods.base import Factors, Method, matches
from svdpeft.registry import KINDS, near_miss

Targets = str | Sequence[str] | Mapping[str, Method]
BROAD = ("all-linear", "all")


@dataclass(frozen=True)
class Choice:
    """One weight that will be adapted: the layers that use it, their kind, and by which method."""

    name: str
    owners: list[nn.Module]
    kind: LayerKind
    method: Method


@dataclass
class Selection:
    """What ``select`` found; ``skipped`` says of every layer with a matrix that is left, why."""

    choices: list[Choice] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return the kind that adapts this layer, or ``None``."""
    return next((kind() for kind in KINDS.values() if kind.handles(module)), None)


def rules(targets: Targets, method: Method | None) -> list[tuple[str, Method]]:
    """Return (pattern, method) pairs in the order in which they are tried."""
    if isinstance(targets, Mapping):
        pairs = list(targets.items())
    elif method is None:
        raise ValueError("a method is needed, unless targets maps patterns to methods")
    else:
        pairs = [(pattern, method) for pattern in ([targets] if isinstance(targets, str) else targets)]
    for pattern, chosen in pairs:
        if not isinstance(chosen, Method):
            raise ValueError(f"{chosen!r} for targets={pattern!r} is not a method, such as LoRA(rank=8)")
    return pairs


def trained_whole(model: nn.Module, patterns: Iterable[str]) -> dict[str, tuple[nn.Module, str]]:
    """Return the parameters that ``train=`` names, as name -> (owner, attribute).

    Raises:
        ValueError: a pattern names no floating-point parameter.
    """
    factors = {id(p) for module in model.modules() if isinstance(module, Factors) for p in module.parameters()}
    first = {id(p): name for name, p in model.named_parameters() if p.is_floating_point() and id(p) not in factors}
    parameters = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if id(p) in first}
    chosen: dict[str, tuple[nn.Module, str]] = {}
    for pattern in patterns:
        found = [name for name in parameters if any(matches(pattern, part) for part in _prefixes(name))]
        if not found:
            leaves = {part for name in parameters for part in _prefixes(name)}
            raise ValueError(f"train={pattern!r} names no parameter: {near_miss(pattern, leaves)}")
        for name in dict.fromkeys(parameters[alias] for alias in found):  # a shared one under its first name
            owner, _, attribute = name.rpartition(".")
            chosen[name] = (model.get_submodule(owner), attribute)
    return chosen


def select(
    model: nn.Module,
    pairs: Sequence[tuple[str, Method]],
    exclude: Sequence[str],
    whole: Iterable[str],
) -> Selection:
    """Choose the sites.

    Args:
        model: any module.
        pairs: (pattern, method) rules; the first that matches a layer decides.
        exclude: patterns of layers that are left alone.
        whole: names of parameters that are trained whole.

    Raises:
        ValueError: a pattern matches no layer that can be adapted, or a named layer shares its weight with one that
            is not adapted.
    """
    selection, trained = Selection(), {id(model.get_parameter(name)) for name in whole}
    heads = _output_layers(model)
    users = users_of_parameters(model)
    read = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    hits = {pattern: 0 for pattern, _ in pairs}
    refused: dict[str, str] = {}  # pattern -> why a layer that it names cannot be adapted
    taken: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, Factors) or not any(p.ndim > 1 for p in module.parameters(recurse=False)):
            continue
        kind = kind_of(module)
        rule = next((rule for rule in pairs if _wants(rule[0], name, kind, module in heads)), None)
        excluded = next((pattern for pattern in exclude if matches(pattern, name)), None)
        reason = None
        if rule is None:
            reason = "output head; name it to adapt it" if module in heads else "not in targets"
        elif excluded is not None:
            reason = f"excluded by {excluded!r}"
        elif kind is None:
            reason = f"no layer kind adapts a {type(module).__name__}"
        elif module in read:
            reason = "its weight is read by nn.MultiheadAttention, which never calls the layer"
        elif module._parameters.get(kind.parameter) is None:
            reason = "its weight is computed by a parametrisation"
        elif id(module._parameters[kind.parameter]) in trained:
            reason = "trained whole"
        if reason is None and kind is not None and rule is not None:
            parameter = module._parameters[kind.parameter]
            if id(parameter) in taken:
                hits[rule[0]] += 1
                continue
            owners = users[id(parameter)]
            strangers = [
                other
                for other, owner in owners.items()
                if not kind.handles(owner)
                or not any(_wants(pattern, other, kind, owner in heads) for pattern, _ in pairs)
                or any(matches(pattern, other) for pattern in exclude)
            ]
            if not strangers:
                taken.add(id(parameter))
                hits[rule[0]] += 1
                selection.choices.append(Choice(name, list(owners.values()), kind, rule[1]))
                continue
            reason = f"its weight is shared with {strangers[0]}, which is not adapted"
        assert reason is not None
        selection.skipped[name] = reason
        if rule is not None and rule[0] not in BROAD and excluded is None:
            refused.setdefault(rule[0], f"{name}: {reason}")
            if "shared" in reason:
                raise ValueError(f"{name} cannot be adapted: {reason}; merging would change both")
    for pattern, count in hits.items():
        if count == 0:
            raise ValueError(_no_site(model, pattern, refused.get(pattern), selection.skipped))
    return selection


def _wants(pattern: str, name: str, kind: LayerKind | None, head: bool) -> bool:
    if pattern in BROAD:
        return not head and (pattern == "all" or (kind is not None and kind.linear))
    return matches(pattern, name)


def _no_site(model: nn.Module, pattern: str, refused: str | None, skipped: Mapping[str, str]) -> str:
    if refused:
        return f"targets={pattern!r} matches no layer that can be adapted; {refused}"
    known = {name.rpartition(".")[2] for name, module in model.named_modules() if kind_of(module)}
    known |= set(BROAD)
    if pattern in BROAD:
        left = [f"{name or 'the model'}: {reason}" for name, reason in skipped.items()]
        why = "; ".join(left[:3]) or f"the model has none of the kinds {', '.join(KINDS)}"
        return f"targets={pattern!r} matches no layer that can be adapted: {why}"
    return f"targets={pattern!r} matches no layer of the model: {near_miss(pattern, known)}"


def users_of_parameters(model: nn.Module) -> dict[int, dict[str, nn.Module]]:
    """Group the layers that hold a parameter by its identity: more than one means that it is tied."""
    users: dict[int, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), {})[name] = module
    return users


def _output_layers(model: nn.Module) -> set[nn.Module]:
    """The classifier of a timm model, the vocabulary head of a transformers one: their own words for it."""
    found: set[nn.Module] = set()
    for accessor in ("get_output_embeddings", "get_classifier"):
        ask: Callable[[], object] | None = getattr(model, accessor, None)
        head = ask() if callable(ask) else None
        if isinstance(head, nn.Module):
            found |= set(head.modules())
    return found


def _prefixes(name: str) -> list[str]:
    """``a.b.c`` -> [``a``, ``a.b``, ``a.b.c``].

    Example:
        >>> _prefixes("head.fc.weight")
        ['head', 'head.fc', 'head.fc.weight']
    """
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
