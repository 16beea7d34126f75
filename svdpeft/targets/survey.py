"""What is known of a model before any weight of it is chosen, and the reasons for which one is left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from svdpeft.layers.base import LayerKind, Ranges
from svdpeft.layers.fused import parts_of
from svdpeft.layers.raw import Raw
from svdpeft.methods.base import PerSite
from svdpeft.patterns import BRACKETS, matches
from svdpeft.registry import KINDS, near_miss
from svdpeft.targets.choice import NotDefined
from svdpeft.targets.inventory import Weight, by_identity, computes_without_gradient, views, weights_of
from svdpeft.targets.pairs import Half, Key, halves
from svdpeft.targets.rules import BROAD, Rule

QUANTISED = "quantised"
STORED = f"stored, or {QUANTISED}, in a way that is not known here"
KEEPS = "{} keeps references of its own to its weights"


class Refusal(NamedTuple):
    """Why a weight is left.

    Args:
        why: in words.
        error: what this is where the weight was named; ``None``: leaving it was asked for, or is no surprise.
    """

    why: str
    error: type[ValueError] | None = None


@dataclass(frozen=True)
class Survey:
    """A model as the choice of its sites sees it.

    Args:
        model: any module.
        weights: every parameter with a matrix.
        rules: what is to be adapted; the first that names a weight decides.
        exclude: patterns of what is left alone.
        trained: ids of the parameters that are trained whole.
        users: every use of a weight, by the parameter's id.
        overlaps: id of a parameter that shares memory with another one -> the other's name.
        halves: the projections of its attentions, where a method works on pairs of them.
    """

    model: nn.Module
    weights: list[Weight]
    rules: list[Rule]
    exclude: tuple[str, ...]
    trained: set[int]
    users: dict[int, list[Weight]]
    overlaps: dict[int, str]
    halves: Mapping[Key, Half | str]

    @classmethod
    def of(
        cls, model: nn.Module, pairs: Sequence[tuple[str, PerSite]], exclude: Sequence[str], whole: Iterable[str]
    ) -> Survey:
        """Look at a model.

        Raises:
            ValueError: no adapter could be right on it, or a pattern excludes nothing.
        """
        for kind in KINDS.values():
            if objection := kind.objection(model):
                raise ValueError(objection)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        weights = weights_of(model)
        rules = [Rule.parse(text, method, weights) for text, method in pairs]
        kinds = {(id(w.module), w.parameter): w.kind for w in weights if w.kind is not None}
        exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        _check_exclude(model, weights, exclude)
        return cls(
            model,
            weights,
            rules,
            exclude,
            {id(parameters[name]) for name in whole},
            by_identity(weights),
            views(weights),
            halves(model, kinds) if any(rule.method.pairs for rule in rules) else {},
        )

    def alone(self, weight: Weight) -> bool:
        """Whether of the uses of a shared weight this one is adapted and no other: it was named, and its layer is
        called, so that the update can be added to its output alone."""
        rule = next((rule for rule in self.rules if rule.wants(weight)), None)
        named = rule is not None and rule.pattern not in BROAD and not rule.method.pairs
        others = [other for other in self.others(weight) if not self.excluded(*other.names)]
        wanted = any(rule.wants(other) for rule in self.rules for other in others)
        return named and weight.kind is not None and weight.kind.called(weight.module) and not wanted

    def excluded(self, *names: str) -> str | None:
        """The pattern that excludes what goes by these names."""
        return next((p for p in self.exclude if any(matches(p, name) for name in names)), None)

    def others(self, weight: Weight) -> list[Weight]:
        """The other uses of the same parameter."""
        return [other for other in self.users[id(weight.tensor)] if other is not weight]

    def refusal(self, weight: Weight, wanting: Sequence[Rule]) -> Refusal | None:
        """Why a weight is left that these rules name, or ``None``; that others share it is not asked here."""
        if not wanting:
            return Refusal(_why_not_wanted(weight))
        if (pattern := self.excluded(*weight.names)) is not None:
            return Refusal(f"excluded by {pattern!r}")
        if id(weight.tensor) in self.trained:
            return Refusal("trained whole")
        if (why := self.why_not_adaptable(weight)) is not None:
            return Refusal(why, ValueError)
        if (why := _why_not_defined(weight, wanting[0].method)) is not None:
            return Refusal(why, NotDefined)
        return None

    def refusal_of_shared(self, weight: Weight) -> Refusal | None:
        """A tied weight is adapted for all its users or for none: merging changes all of them."""
        if self.alone(weight):
            return None
        for other in self.others(weight):
            if not any(rule.wants(other) for rule in self.rules) or self.excluded(other.name):
                return Refusal(
                    f"its weight is shared with {other.name}, which is not adapted; merging would change both. Name "
                    "all its users and they share one adapter, or one that is called, alone",
                    ValueError,
                )
            if not same_matrix(other, weight):
                return Refusal(f"its weight is shared with {other.name}, which sees another matrix in it", ValueError)
            mine, its = (next(rule.method for rule in self.rules if rule.wants(user)) for user in (weight, other))
            if mine != its:
                why = f"its weight is shared with {other.name}, for which another method is named: {its}"
                return Refusal(why, ValueError)
        return None

    def why_not_adaptable(self, weight: Weight) -> str | None:
        """Why no method could adapt the weight, or ``None``."""
        tensor, layer = weight.tensor, type(weight.module).__name__
        if tensor.is_complex():
            return f"it is {tensor.dtype}: keep real and imaginary part as one real parameter (view_as_complex)"
        if (how := weight.scheme) is not None:
            return self._why_not_quantised(weight, how)
        plain = type(tensor) in (nn.Parameter, FakeTensor) and tensor.is_floating_point() and tensor.element_size() > 1
        if not plain or tensor.layout is not torch.strided:
            what = f"{type(tensor).__name__} of {tensor.dtype}"
            return f"its weight is a {what}: {STORED}"
        if (other := self.overlaps.get(id(tensor))) is not None:
            return f"it shares memory with {other}, of which it is a view: merging would change both"
        if computes_without_gradient(weight.module):
            return f"{layer} computes under no_grad: nothing would train there"
        return KEEPS.format(layer) if isinstance(weight.module, nn.RNNBase) else None

    def _why_not_quantised(self, weight: Weight, scheme: str) -> str | None:
        """Why an update cannot go beside a quantised weight, or ``None``."""
        if weight.kind is None or not weight.kind.called(weight.module):
            return (
                f"its weight is {QUANTISED} ({scheme}), and a {type(weight.module).__name__} is not called in a way "
                "that is known here: W0 + ΔW cannot be given in the place of integers"
            )
        others = self.others(weight)
        return f"its {QUANTISED} weight ({scheme}) is shared with {others[0].name}" if others else None


def rows_of_parts(model: nn.Module, weight: Weight, kind: LayerKind) -> dict[str, Ranges]:
    """Return the parts of a fused weight as rows of its matrix; empty where it has none that are known."""
    above, _, leaf = weight.name.rpartition(".")
    return parts_of(kind, weight.module, weight.parameter, leaf, model.get_submodule(above))


def _check_exclude(model: nn.Module, weights: Sequence[Weight], exclude: Sequence[str]) -> None:
    """A pattern that excludes nothing is a misspelt one."""
    known = {name for weight in weights for name in weight.names}
    known |= {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    if any(map(BRACKETS.fullmatch, exclude)):
        for weight in weights:
            known |= {f"{weight.name}[{part}]" for part in rows_of_parts(model, weight, weight.kind or Raw())}
    for pattern in exclude:
        if not any(matches(pattern, name) for name in known):
            leaves = {name.rpartition(".")[2] for name in known} - {""}
            raise ValueError(f"exclude={pattern!r} matches nothing in the model: {near_miss(pattern, leaves)}")


def _why_not_wanted(weight: Weight) -> str:
    if weight.head:
        return "output head; name it to adapt it"
    if isinstance(weight.module, nn.RNNBase):
        return KEEPS.format(type(weight.module).__name__)
    return "a raw parameter; name it to adapt it" if weight.kind is None else "not in targets"


def _why_not_defined(weight: Weight, method: PerSite) -> str | None:
    """Why this method is not defined on the weight, or ``None``."""
    kind = weight.kind or Raw()
    if method.needs == "inputs" and kind.sees and not kind.called(weight.module):
        return "its layer is read and never called, so nobody sees the inputs that the method starts from"
    return None if method.pairs else method.why_not(kind)  # of a pair it is asked where its half is known


def same_matrix(one: Weight, other: Weight) -> bool:
    """Whether two uses of a parameter see the same matrix in it."""

    def view(weight: Weight) -> tuple[Any, ...]:
        matrix = (weight.kind or Raw()).to_matrix(weight.module, weight.values)
        return matrix.shape, matrix.stride(), matrix.data_ptr()

    return view(one) == view(other)
