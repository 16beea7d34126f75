"""Import from Hugging Face PEFT: a folder of ``save_pretrained`` becomes an adapter on the plain base model.

What the folder holds is put into the factors of the method of the same mathematics, so that the adapter trains on from
where it was. Which layers are adapted, and of which rank, the tensors say; the configuration says the rest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.ambient import ordinary
from svdpeft.adapter.attach import install
from svdpeft.adapter.building import given
from svdpeft.adapter.file import undamaged
from svdpeft.adapter.roster import records
from svdpeft.adapter.turns import prepares
from svdpeft.interop.peft_folder import TENSORS, Folder, parameter_of, plain, read
from svdpeft.interop.peft_methods import Found, build
from svdpeft.layers.raw import Raw
from svdpeft.methods.base import Factors, Method, PerSite
from svdpeft.methods.ln_tuning import LNTuning
from svdpeft.methods.whole import Whole
from svdpeft.sites.normalisation import running_statistics
from svdpeft.sites.place import Place
from svdpeft.sites.shards import write
from svdpeft.targets.choice import Choice
from svdpeft.targets.chosen_rows import chosen_rows
from svdpeft.targets.inventory import Weight, users_of_parameters
from svdpeft.targets.survey import Survey
from svdpeft.targets.wrappers import unwrapped

Built = tuple[Choice, PerSite, Factors]


@prepares
@ordinary()
def import_peft(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> Adapter:
    """Attach an adapter that Hugging Face PEFT has saved. PEFT need not be installed.

    Args:
        model: the base that it was trained on, as PEFT was given it; unchanged if anything is wrong.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: of the adapter.

    Returns:
        The adapter: the outputs are PEFT's, and it trains on, merges, saves and is exported as any other. Where PEFT
        takes a start out of the base's weight (PiSSA, OLoRA), the weight here keeps it, and the update subtracts it.

    Raises:
        ValueError: another method than LORA, ADALORA, VERA, RANDLORA, OFT, BOFT and LN_TUNING; a field of the
            configuration that is not understood; a tensor without a place, or one that is missing; another base.

    Example:
        >>> folder = getfixture("tmp_path") / "lora"
        >>> _ = svdpeft.export_lora(svdpeft.attach(nn.Sequential(nn.Linear(6, 4)), svdpeft.LoRA(rank=2)), folder)
        >>> import_peft(nn.Sequential(nn.Linear(6, 4)), folder).patterns
        ['0']
    """
    model, path = unwrapped(model), Path(folder)
    with undamaged(path, kind=ValueError):
        pairs, built, whole, values = _plan(read(path), model)
        adapter = install(model, pairs, built, whole, {}, name, "train")  # a scale may be no float
    for tensor, value in adapter.own.holding(values):
        write(tensor, value)
    return adapter


def _plan(
    found: Folder, model: nn.Module
) -> tuple[list[tuple[str, Method]], list[Built], dict[str, tuple[nn.Module, str]], dict[str, Tensor]]:
    """The patterns, each with its method, the sites, what is trained whole, and values of the base's own tensors."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    statistics, buffers = running_statistics(model), dict(model.named_buffers())
    survey = Survey.of(model, [], (), ())
    weights = {(id(w.module), w.parameter): w for w in survey.weights}
    built = _sites(found, model, weights, survey)
    own = {id(place.module._parameters[place.parameter]) for choice, *_ in built for place in choice.places}
    values: dict[str, Tensor] = {}  # of the base's tensors
    for key, value in found.saved.items():
        here = parameters.get(key, buffers.get(key))
        if here is None:
            raise ValueError(f"{found.path / TENSORS}: {key} has no place in this model")
        if here.shape != value.shape:
            raise ValueError(
                f"{found.path / TENSORS}: {key} is {list(value.shape)} there, {list(here.shape)} in this model; a "
                "vocabulary that grew is given to the base first, model.resize_token_embeddings(len(tokenizer))"
            )
        if not found.trained(key) and torch.equal(here.cpu(), value):
            continue  # an embedding that PEFT writes because it has grown, or is adapted
        if id(here) in own:
            raise ValueError(f"{found.path}: {key} is adapted, and the folder was made for another base")
        if key in parameters or key in statistics:
            values[key] = value.to(here.device, here.dtype)
        elif not torch.equal(here.cpu(), value):
            raise ValueError(f"{found.path / TENSORS}: the buffer {key} is another in this model")
    whole = _whole(model, values, weights, built)
    built += _rows(found, model, whole)
    if not built and not whole:
        raise ValueError(f"{found.path} holds no tensors that adapt anything")
    pairs: list[tuple[str, Method]] = [(choice.name, method) for choice, method, _ in built]
    pairs += [(key, LNTuning()) for key in whole if found.kind == "LN_TUNING"]
    return pairs, built, whole, values


def _sites(found: Folder, model: nn.Module, weights: dict[tuple[int, str], Weight], survey: Survey) -> list[Built]:
    built: list[Built] = []
    record, groups = records(), {}
    for layer, tensors in found.layers.items():
        if not all(t.numel() for t in tensors.values()):
            continue  # AdaLoRA has left no rank there
        name, parameter = parameter_of(found, layer, model)
        weight = weights.get((id(model.get_submodule(name)), parameter))
        if weight is None:
            raise ValueError(f"{found.path / TENSORS} adapts {name}.{parameter}, which is no matrix of this model")
        if (why := survey.why_not_adaptable(weight)) is not None:
            raise ValueError(f"{weight.name} cannot be adapted: {why}")
        place = Place(weight.module, parameter, weight.kind or Raw())
        choice = Choice(weight.name, [place], Whole())
        seen = plain(layer) if parameter == "weight" else f"{name}.{parameter}"
        method, factors = build(found, Found(weight.name, seen, place, given(choice, 0, {}, record), tensors), groups)
        built.append((Choice(weight.name, [place], method), method, factors))
    return built


def _rows(found: Folder, model: nn.Module, whole: Sequence[str] | dict[str, tuple[nn.Module, str]]) -> list[Built]:
    """The rows that were trained alone, of all who share the weight."""
    built: list[Built] = []
    for layer, values in found.rows.items():
        tokens = found["trainable_token_indices"]
        if isinstance(tokens, dict):
            tokens = next((ids for key, ids in tokens.items() if f".{layer}".endswith(f".{key}")), [])
        if len(tokens) != len(values):
            raise ValueError(
                f"{found.path / TENSORS} has {len(values)} rows of {layer}, and the configuration {tokens}"
            )
        order = sorted(range(len(tokens)), key=tokens.__getitem__)
        for choice in chosen_rows(model, {layer: tokens}, whole):
            site = given(choice, 0, {}, records())
            factors = choice.method.factors(site)
            factors.W.data.copy_(values[order])
            built.append((choice, choice.method, factors))
    return built


def _whole(
    model: nn.Module, values: dict[str, Tensor], weights: dict[tuple[int, str], Weight], built: list[Built]
) -> dict[str, tuple[nn.Module, str]]:
    """The places of what was trained whole; a weight of which others have a use that was not is a site instead."""
    users = users_of_parameters(model)
    first = {id(p): name for name, p in model.named_parameters()}
    whole: dict[str, tuple[nn.Module, str]] = {}
    record = records()
    for key in list(values):
        owner, _, attribute = key.rpartition(".")
        module = model.get_submodule(owner)
        parameter = module._parameters.get(attribute)
        if parameter is None:
            continue
        uses = [f"{layer}.{name}".lstrip(".") for layer, name in users[id(parameter)]]
        if all(use in values and torch.equal(values[use], values[key]) for use in uses):
            whole[first[id(parameter)]] = (model.get_submodule(first[id(parameter)].rpartition(".")[0]), attribute)
            continue
        weight = weights[id(module), attribute]
        if weight.kind is None or not weight.kind.called(module):
            raise ValueError(f"{key} is trained whole, and shares its tensor with {', '.join(uses)}, which are not")
        choice = Choice(weight.name, [Place(module, attribute, weight.kind)], Whole())
        factors = choice.method.factors(given(choice, 0, {}, record))
        factors.W.data.copy_(values[key])
        built.append((choice, choice.method, factors))
    return whole
