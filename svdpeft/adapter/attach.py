"""Attaching: from words to sites to factors, and the one step that puts them into a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from svdpeft.adapter.adapter import Adapter, BatchNorm
from svdpeft.adapter.ambient import ordinary
from svdpeft.adapter.building import build
from svdpeft.adapter.file import free_of
from svdpeft.adapter.pretrained import SavePretrained
from svdpeft.adapter.reach import watch
from svdpeft.adapter.roster import ROSTER, Roster, adapted, base_weight, claimed, untied
from svdpeft.adapter.turns import prepares, turns
from svdpeft.decomposition import decomposing_on, processes
from svdpeft.methods.base import (
    Factors,
    Method,
    PerSite,
    Statistics,
)
from svdpeft.sites.place import CHILD
from svdpeft.sites.shards import check_whole
from svdpeft.sites.site import Site
from svdpeft.sites.weights import BaseWeight, stored
from svdpeft.targets.choice import Choice, Selection
from svdpeft.targets.chosen_rows import chosen_rows
from svdpeft.targets.rules import Targets, default_targets, rules
from svdpeft.targets.select import select
from svdpeft.targets.survey import QUANTISED
from svdpeft.targets.whole import biases_of, trained_whole
from svdpeft.targets.wrappers import unwrapped


@prepares
@ordinary()
def attach(
    model: nn.Module,
    method: Method | None = None,
    targets: Targets | None = None,
    exclude: str | Sequence[str] = (),
    train: str | Sequence[str] | Mapping[str, Iterable[int] | None] = (),
    name: str = "default",
    seed: int = 0,
    clip_rank: bool | None = None,
    batch_norm: BatchNorm = "train",
    calibration: Mapping[str, Statistics] | None = None,
    bias: bool = False,
    decompose_on: str | torch.device | None = None,
) -> Adapter:
    """Adapt a model in place: freeze the base, and add to each target layer ΔW = s([L C A]now − [L C A]start).

    Args:
        model: any module with its weights loaded; what torch.compile and DataParallel put around it is seen through.
            Bad input raises before anything of it changes.
        method: such as ``SORSA(rank=16)``; may be left out where ``targets`` maps patterns to methods.
        targets: ``"all-linear"`` (every weight that multiplies the features of its input, but the output head),
            ``"all"`` (every weight of a known kind but the head), ``None`` (``"all"`` of a model that is mostly
            convolutions, else ``"all-linear"``), patterns, or a mapping from pattern to method. A
            pattern is a name, a suffix of whole dotted parts, or a regular expression for the whole name; of RWKV also
            ``"rwkv"``, ``"rwkv-time-mix"``, or a role such as ``"time-mix.decay"``. Brackets choose parts of a fused
            weight, ``"qkv[q,v]"``, or name the axes of a raw parameter, ``"spectral[in,out,mode]"``.
        exclude: patterns of what is left alone: layers, or parts of a fused one.
        train: patterns of modules or parameters of the base that are trained whole, such as a new head; or a mapping
            from such a pattern to the rows of it that are trained alone, ``{"embed_tokens": [32000, 32001]}``, in all
            layers that share the weight (``None``: the whole of it).
        name: of the adapter; several of different names add up.
        seed: of every random draw; each site's own depends on this and on its name only.
        clip_rank: lower a rank that is too large for a small matrix instead of raising; the scale α/r stays that of the
            rank that was asked for. ``None``: of a model that is mostly convolutions, where targets are left out;
            ``summary()`` says which were lowered.
        batch_norm: ``"train"``: normalisation layers follow ``model.train()``, and the running statistics that this
            changes are saved with the adapter. ``"frozen"``: they stay in evaluation mode.
        calibration: what ``svdpeft.calibrate`` saw, for methods that start from data.
        bias: the biases of the adapted layers are trained whole, too, as LoRA's code offers (``"lora_only"``).
        decompose_on: device of the decompositions, such as ``"cuda"`` for a model on the CPU: one weight at a time is
            there, and what is kept of it comes back. ``None``: the device of each weight.

    Returns:
        The adapter. The model's outputs are the base model's.

    Raises:
        ValueError: nothing to train; no layer matches; a rank, weight, name or device that cannot be; a model that is
            sharded over processes already.

    Example:
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> adapter = attach(model, SORSA(rank=2), targets=["0"])
        >>> adapter.trainable_count  # 2 · (6 + 8 + 1)
        30
    """
    model = unwrapped(model)
    check_whole(model, "attach")
    roster = getattr(model, ROSTER, None) or Roster(model)
    _check_name(name, roster)
    if batch_norm not in ("train", "frozen"):
        raise ValueError(f"batch_norm {batch_norm!r} is neither 'train' nor 'frozen'")
    known = default_targets(model) if targets is None else targets
    clip = (targets is None and known == "all") if clip_rank is None else clip_rank
    pairs = rules(known, method)
    named = {train: None} if isinstance(train, str) else train if isinstance(train, Mapping) else dict.fromkeys(train)
    entire = [pattern for pattern, rows in named.items() if rows is None]
    whole = trained_whole(model, [*entire, *(pattern for _, m in pairs for pattern in m.whole(model))])
    _check_whole(whole, roster)
    rows = chosen_rows(model, {pattern: rows for pattern, rows in named.items() if rows is not None}, whole)
    factored = [(pattern, m) for pattern, m in pairs if isinstance(m, PerSite)]
    unavailable = [*whole, *(parameter for other in roster.adapters.values() for parameter in other.whole)]
    selection = select(model, factored, exclude, unavailable) if factored else Selection()
    _check_rows(rows, selection.choices)
    if bias:
        whole |= biases_of(model, (place.module for choice in selection.choices for place in choice.places))
        _check_whole(whole, roster)
    with decomposing_on(decompose_on):
        built = build([*selection.choices, *rows], seed, clip, calibration or {})
    if not built and not whole:
        raise ValueError(f"{method} would train nothing: name the parameters to train with train=")
    _warn_of_stored(selection.skipped)
    _warn_of_half(whole)
    return install(model, pairs, built, whole, selection.skipped, name, batch_norm)


def _check_rows(rows: Sequence[Choice], others: Sequence[Choice]) -> None:
    """Rows of a tied weight are those of all its users: one of them that is adapted alone could never be merged."""
    for choice in rows:
        modules = {place.module for place in choice.places}
        for other in others:
            mine = {place.module for place in other.places}
            if mine < modules:
                raise ValueError(
                    f"{other.name} shares its weight with other layers and is to be adapted alone, and {choice.name} "
                    "is of all of them: name all of them in targets"
                )


def _warn_of_stored(skipped: Mapping[str, str]) -> None:
    """On a partly quantised model an adapter of all layers is one of the rest: usually the few that matter least."""
    found = [name for name, why in skipped.items() if QUANTISED in why]
    if found:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        warnings.warn(
            f"{found[0]}{more} is not adapted: {skipped[found[0]]}. Name the targets to leave it out knowingly; "
            "adapter.skipped has them all",
            stacklevel=3,
        )


def _warn_of_half(whole: Mapping[str, tuple[nn.Module, str]]) -> None:
    """A parameter that trains whole has no copy in float32, as factors are."""
    half = {name: dtype for name, place in whole.items() if (dtype := stored(*place).dtype).itemsize < 4}
    if half:
        name, dtype = next(iter(half.items()))
        why = (
            "a gradient scaler refuses its gradients"
            if dtype == torch.float16
            else "a step below 1/256 of a value is lost in rounding, so that it hardly moves at usual learning rates"
        )
        layer = name.rpartition(".")[0] or "the model"
        warnings.warn(
            f"{name} trains whole in {dtype}{f', and {len(half) - 1} more' if len(half) > 1 else ''}: {why}. Make it "
            f"float32 before attaching, model.get_submodule({layer!r}).float(), and train under autocast (bf16=True or "
            "fp16=True of the trainers)",
            stacklevel=3,
        )


def install(
    model: nn.Module,
    pairs: Sequence[tuple[str, Method]],
    built: Sequence[tuple[Choice, PerSite, Factors]],
    whole: Mapping[str, tuple[nn.Module, str]],
    skipped: Mapping[str, str],
    name: str,
    batch_norm: BatchNorm,
) -> Adapter:
    """Put checked parts into the model: the only step that changes it. Used by ``attach`` and by ``load``."""
    roster: Roster = getattr(model, ROSTER, None) or Roster(model)
    _check_name(name, roster)
    _check_whole(whole, roster)
    _check_free(built, name)
    sites: dict[str, Site] = {}
    others = adapted()
    weights: dict[int, BaseWeight] = {}  # several sites may be parts of one weight
    for choice, method, factors in built:
        place = choice.places[0]
        parameter = place.module._parameters[place.parameter]
        weight = weights.setdefault(id(parameter), base_weight(place.module, place.parameter, others))
        sites[choice.name] = site_of(choice, method, factors, weight)
    with turns(model).change(f"attaching adapter {name!r}"):
        roster.enter()
        SavePretrained.stand_in(model)
        adapter = Adapter(model, name, list(pairs), sites, dict(whole), dict(skipped), batch_norm)
        roster.adapters[name] = adapter
        for site in sites.values():
            site.install(name)
        if processes()[1] > 1:  # what each weight is known by, while it is here: it may be sharded before it is saved
            free = free_of(sites.values())
            for site in sites.values():
                site.weight.identity(free[id(site.weight)])
        roster.freeze()
        if sites:
            watch(model, roster.sites)
    return adapter


def site_of(choice: Choice, method: PerSite, factors: Factors, weight: BaseWeight) -> Site:
    """The site that was chosen, with its factors on the device of its weight; not in the model yet."""
    place = choice.places[0]
    matrix = place.kind.to_matrix(place.module, weight.original)
    shape = (matrix[..., 0, 0].numel(), matrix.shape[-2], matrix.shape[-1])
    if any(tensor.device != matrix.device for tensor in factors.tensors().values()):
        factors.to(matrix.device)
    return Site(choice.name, choice.places, choice.part, method, factors, weight, shape)


def _check_free(built: Sequence[tuple[Choice, PerSite, Factors]], name: str) -> None:
    """A weight is adapted, or trained whole, but not both; and a layer knows each adapter by one name."""
    whole, loose = claimed(), untied()
    for choice, _, _ in built:
        for place in choice.places:
            if (other := loose.get(id(stored(place.module, place.parameter)))) is not None:
                raise ValueError(
                    f"{choice.name} cannot be adapted: adapter {other!r} has untied it; unmerge() that first"
                )
            if (parameter := whole.get(id(stored(place.module, place.parameter)))) is not None:
                raise ValueError(f"{choice.name} cannot be adapted: another adapter trains {parameter} whole")
            if place.key_for(name, choice.part) in getattr(place.module, CHILD, {}):
                raise ValueError(
                    f"{choice.name} has an adapter named {name!r} already, attached to a part of this model or to a "
                    "larger one: give this one another name"
                )


def _check_name(name: str, roster: Roster) -> None:
    if name in roster.adapters:
        raise ValueError(f"an adapter named {name!r} is attached already: detach it, or give this one another name")
    check_name(name)


def check_name(name: str) -> None:
    """Refuse a name that an adapter cannot have, in a model or in a file."""
    if not name or "." in name:
        raise ValueError(f"adapter name {name!r} must be non-empty and without a dot: it becomes part of tensor names")


def _check_whole(whole: Mapping[str, tuple[nn.Module, str]], roster: Roster) -> None:
    """Adapters of one model have versions of a parameter; none of a part of it, or of a larger one, has it as well."""
    others, sites, loose = claimed(but=roster), adapted(), untied()
    for name in sorted(whole):
        parameter = id(stored(*whole[name]))
        if parameter in loose:
            raise ValueError(
                f"{name} cannot be trained: adapter {loose[parameter]!r} has untied it; unmerge() that first"
            )
        if parameter in others:
            known = others[parameter]
            raise ValueError(
                f"{name} is trained whole already, as {known}, by an adapter that is attached to a part of this model, "
                "or to a larger one: attach both to the same"
            )
        if parameter in sites:
            raise ValueError(f"{name} cannot be trained whole: another adapter adapts it, as {sites[parameter].name}")
