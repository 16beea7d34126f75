"""From words to sites: which weights of a model are adapted, and why the rest is left.

Patterns mean the same everywhere (targets, exclude, train, rank): a name, a suffix of whole dotted parts, or a
regular expression that matches the whole name. A target may end in brackets: ``qkv[q,v]`` are parts of a fused weight,
``spectral[in,out,mode]`` the axes of a raw parameter.

Every weight gets a verdict of its own; together they are the selection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import nn

from svdpeft.layers.part import Part
from svdpeft.layers.raw import Raw
from svdpeft.methods.base import PerSite
from svdpeft.patterns import matches
from svdpeft.registry import KINDS, near_miss
from svdpeft.sites.place import Place
from svdpeft.targets.choice import Choice, NotDefined, Selection
from svdpeft.targets.inventory import Weight
from svdpeft.targets.pairs import STAYS, UNKNOWN
from svdpeft.targets.rules import BROAD, Rule
from svdpeft.targets.survey import Survey, rows_of_parts


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
    survey = Survey.of(model, pairs, exclude, whole)
    taken: set[int] = set()  # a tied weight is chosen where it is first used
    verdicts = [_verdict(survey, weight, taken) for weight in survey.weights]
    verdicts.append(_Verdict(left=list(_computed(survey))))
    choices = [choice for verdict in verdicts for _, choice in verdict.chosen]
    left = [each for verdict in verdicts for each in verdict.left]
    selection = Selection(choices, {each.name: each.why for each in left})
    met = {rule.text for verdict in verdicts for rule in (*verdict.met, *(rule for rule, _ in verdict.chosen))}
    for rule in survey.rules:
        if rule.text not in met:
            raise _nothing_for(rule, survey, [each for each in left if rule in each.asked], selection)
    return selection


class _Left(NamedTuple):
    """A weight, or a part of one, that is left.

    Args:
        name: of it.
        why: in words.
        asked: the rules that asked for it.
        elsewhere: it is not what the method of the rule works on, which may be found elsewhere.
    """

    name: str
    why: str
    asked: tuple[Rule, ...] = ()
    elsewhere: bool = False


@dataclass(frozen=True)
class _Verdict:
    """What becomes of one weight.

    Args:
        chosen: its sites, several for the parts of a fused weight, each with the rule that chose it.
        left: it, or its parts, with the reason.
        met: rules that name another use of a tied weight that was chosen already.
    """

    chosen: list[tuple[Rule, Choice]] = field(default_factory=list)
    left: list[_Left] = field(default_factory=list)
    met: tuple[Rule, ...] = ()


def _verdict(survey: Survey, weight: Weight, taken: set[int]) -> _Verdict:
    wanting = [rule for rule in survey.rules if rule.wants(weight)]
    refusal = survey.refusal(weight, wanting)
    if refusal is None and id(weight.tensor) in taken:
        return _Verdict(met=(wanting[0],))
    refusal = refusal or survey.refusal_of_shared(weight)
    if refusal is not None:
        named = next((rule for rule in wanting if rule.pattern not in BROAD), None)
        if named is not None and refusal.error is not None:
            raise refusal.error(f"{weight.name} cannot be adapted: {refusal.why}")
        return _Verdict(left=[_Left(weight.name, refusal.why, () if named is None else (named,))])
    taken.add(id(weight.tensor))
    verdict = _by_parts(survey, weight, wanting)
    return _by_heads(survey, verdict) if any(rule.method.pairs for rule in wanting) else verdict


def _by_parts(survey: Survey, weight: Weight, wanting: Sequence[Rule]) -> _Verdict:
    """One choice for a weight, or one for each part of it that is wanted."""
    first, users = wanting[0], [weight, *([] if survey.alone(weight) else survey.others(weight))]
    kind = weight.kind or Raw(first.axes)
    if isinstance(kind, Raw):
        kind.check_axes(weight.values, weight.name)
    rows = rows_of_parts(survey.model, weight, kind)
    excluded = {part: survey.excluded(f"{weight.name}[{part}]") for part in rows}
    always = kind.split or first.method.pairs
    if not ((always and rows) or any(rule.parts for rule in wanting) or any(excluded.values())):
        if first.axes and weight.kind is not None:
            raise ValueError(f"targets={first.text!r}: {weight.name} is of kind {kind.name!r}, which knows its axes")
        places = [Place(w.module, w.parameter, w.kind or kind) for w in users]
        return _Verdict([(first, Choice(weight.name, places, first.method, roles=weight.roles))])
    wanted: dict[str, Rule] = {}
    for rule in wanting:
        for part in rule.parts or rows:
            if part not in rows:
                known = f"it has {', '.join(rows)}" if rows else "its weight is not known to be made of parts"
                raise ValueError(f"targets={rule.text!r}: {weight.name} has no part {part!r}; {known}")
            wanted.setdefault(part, rule)
    verdict = _Verdict()
    for part, ranges in rows.items():
        name, rule = f"{weight.name}[{part}]", wanted.get(part)
        if rule is None or excluded[part] is not None:
            verdict.left.append(_Left(name, "not in targets" if rule is None else f"excluded by {excluded[part]!r}"))
            continue
        places = []
        for user in users:
            of = user.kind or kind
            total = of.to_matrix(user.module, user.values).shape[-2]
            places.append(Place(user.module, user.parameter, Part(of, ranges, total)))
        verdict.chosen.append((rule, Choice(name, places, rule.method, part, weight.roles)))
    return verdict


def _by_heads(survey: Survey, verdict: _Verdict) -> _Verdict:
    """The choices of methods that work on pairs, shown head by head; what is no half of a pair is left."""
    chosen, left = [], list(verdict.left)
    for rule, choice in verdict.chosen:
        if rule.method.pairs:
            choice, why = _half(survey, choice)
            if why is not None:
                left.append(_Left(choice.name, why, (rule,), elsewhere=why in (STAYS, UNKNOWN)))
                continue
        chosen.append((rule, choice))
    return _Verdict(chosen, left)


def _half(survey: Survey, choice: Choice) -> tuple[Choice, str | None]:
    place = choice.places[0]
    half = survey.halves.get((id(place.module), place.parameter, choice.part), UNKNOWN)
    if isinstance(half, str):
        return choice, half
    if half.pair not in choice.method.pairs:
        return choice, f"not in pairs={choice.method.pairs}"
    if len(choice.places) > 1:
        return choice, "its weight is shared with another layer, which has a pair of its own"
    places = [Place(place.module, place.parameter, half.kind)]
    return replace(choice, places=places, half=half), choice.method.why_not(half.kind)


def _computed(survey: Survey) -> Iterator[_Left]:
    """The weights that a parametrisation computes: they are no parameters."""
    for name, module in survey.model.named_modules():
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            layer, _, parameter = name.rpartition(".parametrizations.")
            asked = tuple(rule for rule in survey.rules if matches(rule.pattern, layer))
            yield _Left(layer, f"its {parameter} is computed by a parametrisation", asked)


def _nothing_for(rule: Rule, survey: Survey, asked: Sequence[_Left], selection: Selection) -> ValueError:
    """What is wrong with a rule that chose nothing: ``asked`` is what it asked for."""
    start = f"targets={rule.text!r} matches no weight"
    refused = [each for each in asked if not each.elsewhere] or asked
    if refused:
        error = NotDefined if refused[0].elsewhere else ValueError
        return error(f"{start} that can be adapted; {refused[0].name}: {refused[0].why}")
    if rule.pattern in BROAD:
        left = [f"{name or 'the model'}: {reason}" for name, reason in selection.skipped.items()]
        why = "; ".join(left[:3]) or f"the model has none of the kinds {', '.join(KINDS)}"
        more = "; targets='all' takes convolutions and the like, too" if rule.pattern == "all-linear" else ""
        return ValueError(f"{start} that can be adapted: {why}{more}")
    weights = survey.weights
    for weight in filter(rule.wants, weights):
        before = next(other for other in survey.rules if other.wants(weight))
        return ValueError(
            f"targets={rule.text!r} has no effect: {before.text!r}, which stands before it, decides for {weight.name}"
        )
    for name, module in survey.model.named_modules():
        inside = [weight.name for weight in weights if name and weight.name.startswith(f"{name}.")]
        if inside and matches(rule.pattern, name):
            shown = ", ".join(inside[:5]) + (", …" if len(inside) > 5 else "")
            every = rf"{re.escape(name)}\..*"
            return ValueError(
                f"{start} of its own: {name} is a {type(module).__name__}, which holds {shown}: name those, or all of "
                f"them by {every!r}"
            )
    known = {weight.name.rpartition(".")[2] for weight in weights} | {r for w in weights for r in w.roles} | set(BROAD)
    known |= {name.rpartition(".")[2] for name, _ in survey.model.named_modules() if name}
    return ValueError(f"{start} of the model: {near_miss(rule.pattern, known)}")
