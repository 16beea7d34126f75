"""From words to sites: which weights of a model are adapted, which are trained whole, and why the rest is left.

Patterns mean the same everywhere (targets, exclude, train, rank): a name, a suffix of whole dotted parts, or a
regular expression that matches the whole name. A target may end in brackets: ``qkv[q,v]`` are parts of a fused weight,
``spectral[in,out,mode]`` the axes of a raw parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from svdpeft.factors import Factors
from svdpeft.inventory import Weight, by_identity, computes_without_gradient, views, weights_of
from svdpeft.layers.base import LayerKind, Rows
from svdpeft.layers.fused import Part, parts_of
from svdpeft.layers.raw import Raw
from svdpeft.methods.base import Method, PerSite
from svdpeft.pairs import STAYS, UNKNOWN, Half, Key, halves
from svdpeft.patterns import BRACKETS, matches
from svdpeft.registry import KINDS, near_miss
from svdpeft.sites import Place

Targets = str | Sequence[str] | Mapping[str, Method]
BROAD = ("all-linear", "all")
_KEEPS = "{} keeps references of its own to its weights"


class NotDefined(ValueError):
    """The method is not defined on what it was to adapt: it works on attention, or on inputs, and there are none."""


@dataclass(frozen=True)
class Choice:
    """One weight, or one part of it, that will be adapted: where it is used, and by which method."""

    name: str
    places: list[Place]
    method: PerSite
    part: str = ""
    roles: tuple[str, ...] = ()
    half: Half | None = None  # of a pair of weights, for methods that work on pairs


@dataclass
class Selection:
    """What ``select`` found; ``skipped`` says of every weight with a matrix that is left, why."""

    choices: list[Choice] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """One entry of ``targets``.

    Args:
        text: as the user wrote it.
        pattern: without its brackets.
        words: in the brackets: parts of a fused weight, or axes of a raw parameter.
        method: for what it names.
    """

    text: str
    pattern: str
    words: tuple[str, ...]
    method: PerSite

    @classmethod
    def parse(cls, text: str, method: PerSite, weights: Sequence[Weight]) -> Rule:
        """Take the brackets apart; those of a regular expression that names weights stay where they are."""
        found = BRACKETS.fullmatch(text)
        if found is None or any(matches(text, name) for weight in weights for name in weight.names):
            return cls(text, text, (), method)
        return cls(text, found[1], tuple(word.strip() for word in found[2].split(",")), method)

    @property
    def axes(self) -> tuple[str, ...]:
        """The words, where they are axes."""
        return self.words if {"in", "out"} <= set(self.words) else ()

    @property
    def parts(self) -> tuple[str, ...]:
        """The words, where they are parts."""
        return () if self.axes else self.words

    def wants(self, weight: Weight) -> bool:
        """Whether the rule names a weight."""
        if self.pattern in BROAD:
            kind = weight.kind
            return not weight.head and kind is not None and (self.pattern == "all" or kind.linear)
        if weight.kind is None and not self.axes:  # a regular expression for layers does not mean raw parameters
            return weight.name == self.pattern or weight.name.endswith("." + self.pattern)
        return any(matches(self.pattern, name) for name in weight.names)


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
    pairs: Sequence[tuple[str, PerSite]],
    exclude: Sequence[str],
    whole: Iterable[str],
) -> Selection:
    """Choose the sites.

    Args:
        model: any module.
        pairs: (pattern, method) rules; the first that matches a weight, or a part of it, decides.
        exclude: patterns of sites that are left alone.
        whole: names of parameters that are trained whole.

    Raises:
        ValueError: a pattern matches no weight that can be adapted, or names one that cannot be: of a tied weight only
            one user, a part that does not exist, a quantised weight, a view of another.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    selection, trained = Selection(), {id(parameters[name]) for name in whole}
    for known in KINDS.values():
        if objection := known.objection(model):
            raise ValueError(objection)
    weights = weights_of(model)
    listed = [Rule.parse(text, method, weights) for text, method in pairs]
    exclude = (exclude,) if isinstance(exclude, str) else exclude
    _check_exclude(model, weights, exclude)
    shared, users = views(weights), by_identity(weights)
    hits = dict.fromkeys((rule.text for rule in listed), 0)
    refused: dict[str, str] = {}  # rule -> why a weight that it names cannot be adapted
    unasked: dict[str, str] = {}  # rule -> the same of a weight that is not what its method works on
    kinds = {(id(w.module), w.parameter): w.kind for w in weights if w.kind is not None}
    known = halves(model, kinds) if any(rule.method.pairs for rule in listed) else {}
    taken: set[int] = set()
    for weight in weights:
        wanting = [rule for rule in listed if rule.wants(weight)]
        excluded = next((p for p in exclude if any(matches(p, n) for n in weight.names)), None)
        named = next((rule for rule in wanting if rule.pattern not in BROAD), None)
        reason, error = _why_not(weight, wanting, excluded, trained, shared)
        if reason is None and id(weight.tensor) in taken:
            for rule in wanting[:1]:
                hits[rule.text] += 1
            continue
        if reason is None:
            others = [other for other in users[id(weight.tensor)] if other is not weight]
            reason = _why_not_shared(weight, others, listed, exclude)
            error = ValueError
        if reason is None:
            taken.add(id(weight.tensor))
            same = [weight, *(o for o in users[id(weight.tensor)] if o is not weight)]
            for choice, rule in _choose(model, same, wanting, exclude, selection.skipped):
                if rule.method.pairs:
                    choice, reason = _by_heads(choice, known)
                    if reason is not None:
                        selection.skipped[choice.name] = reason
                        (unasked if reason in (STAYS, UNKNOWN) else refused).setdefault(
                            rule.text, f"{choice.name}: {reason}"
                        )
                        continue
                hits[rule.text] += 1
                selection.choices.append(choice)
            continue
        selection.skipped[weight.name] = reason
        if named is not None:
            refused.setdefault(named.text, f"{weight.name}: {reason}")
            if error is not None and excluded is None:
                raise error(f"{weight.name} cannot be adapted: {reason}")
    for name, module in model.named_modules():
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            layer, _, parameter = name.rpartition(".parametrizations.")
            selection.skipped[layer] = f"its {parameter} is computed by a parametrisation"
            for rule in listed:
                if matches(rule.pattern, layer):
                    refused.setdefault(rule.text, f"{layer}: {selection.skipped[layer]}")
    for rule in listed:
        if hits[rule.text] == 0:
            why = refused.get(rule.text) or unasked.get(rule.text)
            error = NotDefined if rule.text in unasked and rule.text not in refused else ValueError
            raise error(_no_site(rule, weights, why, selection.skipped))
    return selection


def _check_exclude(model: nn.Module, weights: Sequence[Weight], exclude: Sequence[str]) -> None:
    """A pattern that excludes nothing is a misspelt one."""
    known = {name for weight in weights for name in weight.names}
    known |= {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    parts = {
        f"{weight.name}[{part}]"
        for weight in weights
        if any(map(BRACKETS.fullmatch, exclude))
        for part in _rows(model, weight, weight.kind or Raw())
    }
    for pattern in exclude:
        if not any(matches(pattern, name) for name in known | parts):
            leaves = {name.rpartition(".")[2] for name in known | parts} - {""}
            raise ValueError(f"exclude={pattern!r} matches nothing in the model: {near_miss(pattern, leaves)}")


def _why_not(
    weight: Weight, wanting: list[Rule], excluded: str | None, trained: set[int], shared: Mapping[int, str]
) -> tuple[str | None, type[ValueError] | None]:
    """Return why a weight is left, and the error that this is where it was named."""
    kind, tensor = weight.kind, weight.tensor
    if not wanting:
        if weight.head:
            return "output head; name it to adapt it", None
        if isinstance(weight.module, nn.RNNBase):
            return _KEEPS.format(type(weight.module).__name__), None
        if kind is None:
            return "a raw parameter; name it to adapt it", None
        return "not in targets", None
    if excluded is not None:
        return f"excluded by {excluded!r}", None
    if id(tensor) in trained:
        return "trained whole", None
    if tensor.is_complex():
        return f"it is {tensor.dtype}: keep real and imaginary part as one real parameter (view_as_complex)", ValueError
    plain = type(tensor) is nn.Parameter and tensor.is_floating_point() and tensor.element_size() > 1
    if not plain or tensor.layout is not torch.strided:
        what = f"{type(tensor).__name__} of {tensor.dtype}"
        return f"its weight is a {what}: stored, or quantised, in a way that is not known here", ValueError
    if id(tensor) in shared:
        return (
            f"it shares memory with {shared[id(tensor)]}, of which it is a view: merging would change both",
            ValueError,
        )
    if computes_without_gradient(weight.module):
        return f"{type(weight.module).__name__} computes under no_grad: nothing would train there", ValueError
    if isinstance(weight.module, nn.RNNBase):
        return _KEEPS.format(type(weight.module).__name__), ValueError
    if wanting[0].method.needs == "inputs" and kind is not None and kind.sees and not kind.called(weight.module):
        return "its layer is read and never called, so nobody sees the inputs that the method starts from", NotDefined
    if not wanting[0].method.pairs and (reason := wanting[0].method.why_not(kind or Raw())) is not None:
        return reason, NotDefined
    return None, None


def _why_not_shared(weight: Weight, others: list[Weight], rules: Sequence[Rule], exclude: Sequence[str]) -> str | None:
    """A tied weight is adapted for all its users or for none: merging changes all of them."""
    mine = _view(weight)
    for other in others:
        wanted = any(rule.wants(other) for rule in rules) and not any(matches(p, other.name) for p in exclude)
        if not wanted:
            return (
                f"its weight is shared with {other.name}, which is not adapted; merging would change both. Name both "
                "and they share one adapter"
            )
        if _view(other) != mine:
            return f"its weight is shared with {other.name}, which sees another matrix in it"
        methods = [next(rule.method for rule in rules if rule.wants(user)) for user in (weight, other)]
        if methods[0] != methods[1]:
            return f"its weight is shared with {other.name}, for which another method is named: {methods[1]}"
    return None


def _view(weight: Weight) -> tuple[Any, ...]:
    kind = weight.kind or Raw()
    matrix = kind.to_matrix(weight.module, weight.tensor)
    return matrix.shape, matrix.stride(), matrix.data_ptr()


def _rows(model: nn.Module, weight: Weight, kind: LayerKind) -> dict[str, Rows]:
    above, _, leaf = weight.name.rpartition(".")
    return parts_of(kind, weight.module, weight.parameter, leaf, model.get_submodule(above))


def _choose(
    model: nn.Module, users: list[Weight], wanting: list[Rule], exclude: Sequence[str], skipped: dict[str, str]
) -> list[tuple[Choice, Rule]]:
    """Turn one weight into one choice, or into one per part."""
    weight, first = users[0], wanting[0]
    kind = weight.kind or Raw(first.axes)
    if isinstance(kind, Raw):
        kind.check_axes(weight.tensor, weight.name)
    rows = _rows(model, weight, kind)
    by_part = {part: next((p for p in exclude if matches(p, f"{weight.name}[{part}]")), None) for part in rows}
    always = kind.split or first.method.pairs
    apart = (always and rows) or any(rule.parts for rule in wanting) or any(by_part.values())
    if not apart:
        if first.axes and weight.kind is not None:
            raise ValueError(f"targets={first.text!r}: {weight.name} is of kind {kind.name!r}, which knows its axes")
        places = [Place(w.module, w.parameter, w.kind or kind) for w in users]
        return [(Choice(weight.name, places, first.method, roles=weight.roles), first)]
    chosen: dict[str, Rule] = {}
    for rule in wanting:
        for part in rule.parts or rows:
            if part not in rows:
                known = f"it has {', '.join(rows)}" if rows else "its weight is not known to be made of parts"
                raise ValueError(f"targets={rule.text!r}: {weight.name} has no part {part!r}; {known}")
            chosen.setdefault(part, rule)
    found = []
    for part, runs in rows.items():
        name = f"{weight.name}[{part}]"
        rule, excluded = chosen.get(part), by_part[part]
        if rule is None or excluded is not None:
            skipped[name] = "not in targets" if rule is None else f"excluded by {excluded!r}"
            continue
        places = []
        for w in users:
            whole = w.kind or kind
            total = whole.to_matrix(w.module, w.tensor).shape[-2]
            places.append(Place(w.module, w.parameter, Part(whole, runs, total)))
        found.append((Choice(name, places, rule.method, part, weight.roles), rule))
    return found


def _by_heads(choice: Choice, known: Mapping[Key, Half | str]) -> tuple[Choice, str | None]:
    """Show a choice head by head, or say why it is no half of a pair that its method works on."""
    place = choice.places[0]
    half = known.get((id(place.module), place.parameter, choice.part), UNKNOWN)
    if isinstance(half, str):
        return choice, half
    if half.pair not in choice.method.pairs:
        return choice, f"not in pairs={choice.method.pairs}"
    if len(choice.places) > 1:
        return choice, "its weight is shared with another layer, which has a pair of its own"
    places = [Place(place.module, place.parameter, half.kind)]
    return replace(choice, places=places, half=half), choice.method.why_not(half.kind)


def _no_site(rule: Rule, weights: Sequence[Weight], refused: str | None, skipped: Mapping[str, str]) -> str:
    if refused:
        return f"targets={rule.text!r} matches no weight that can be adapted; {refused}"
    if rule.pattern in BROAD:
        left = [f"{name or 'the model'}: {reason}" for name, reason in skipped.items()]
        why = "; ".join(left[:3]) or f"the model has none of the kinds {', '.join(KINDS)}"
        return f"targets={rule.text!r} matches no weight that can be adapted: {why}"
    known = {weight.name.rpartition(".")[2] for weight in weights} | {r for w in weights for r in w.roles} | set(BROAD)
    return f"targets={rule.text!r} matches no weight of the model: {near_miss(rule.pattern, known)}"


def _prefixes(name: str) -> list[str]:
    """``a.b.c`` -> [``a``, ``a.b``, ``a.b.c``].

    Example:
        >>> _prefixes("head.fc.weight")
        ['head', 'head.fc', 'head.fc.weight']
    """
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
