"""What the words of ``targets`` mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from svdpeft.methods.base import Method, PerSite
from svdpeft.patterns import BRACKETS, matches
from svdpeft.targets.inventory import Weight, weights_of

Targets = str | Sequence[str] | Mapping[str, Method]
BROAD = ("all-linear", "all")


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


def default_targets(model: nn.Module) -> str:
    """What is adapted where nobody says it: ``"all"`` of a model that is mostly convolutions, else ``"all-linear"``."""
    weights = [weight for weight in weights_of(model) if weight.kind is not None and not weight.head]
    linear = sum(w.count for w in weights if w.kind is not None and w.kind.linear)
    convolutions = sum(w.count for w in weights if w.kind is not None and w.kind.name.startswith("conv"))
    return "all" if convolutions > linear else "all-linear"


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
