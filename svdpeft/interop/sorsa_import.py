"""Import from SORSA's official package: a folder of its ``SORSAModel.save_pretrained`` becomes an adapter on the base.

    W' = R + s B diag(S) A        R = W0 − s B₀ diag(S₀) A₀, frozen, often rounded to bfloat16        s = 1, or α/r

The folder holds a whole model, of each adapted layer R (``weight``), A (``sorsa_A``), S and B, and nothing of the
start. W0 − R is the start, to the rounding of R, so that the start here is its nearest matrix of rank r.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.ambient import ordinary
from svdpeft.adapter.attach import install
from svdpeft.adapter.building import given
from svdpeft.adapter.roster import records
from svdpeft.adapter.turns import prepares
from svdpeft.decomposition import all_finite, truncated_svd
from svdpeft.methods.base import Factors, PerSite
from svdpeft.methods.sorsa import SORSA
from svdpeft.sites.place import Place
from svdpeft.targets.choice import Choice
from svdpeft.targets.inventory import Weight
from svdpeft.targets.survey import Survey
from svdpeft.targets.wrappers import unwrapped

CONFIG, TENSORS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PREFIX = "model."  # the attribute in which the package keeps the base
ROLES = {"sorsa_B": "L", "sorsa_S": "C", "sorsa_A": "A"}
READ = {"rank": (int,), "alpha": (int, float, NoneType), "dropout": (int, float, NoneType)}
SILENT = (  # of the configuration: nothing of the function that the tensors do not say
    *("model_type", "architectures", "base_model_name_or_path", "_name_or_path", "target_modules"),
    *("dtype", "torch_dtype", "transformers_version"),
)
SLACK = 64  # of float32's eps: what two decompositions, and the products of their factors, differ by


@dataclass(frozen=True)
class Checkpoint:
    """A folder of the package.

    Args:
        path: of it, for messages.
        config: the configuration.
        files: name of a tensor, in the base's own spelling -> the file that has it.
    """

    path: Path
    config: Mapping[str, Any]
    files: Mapping[str, Path]

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            ValueError: a value is not finite.
        """
        with safe_open(self.files[name], "pt") as file:
            found = file.get_tensor(PREFIX + name)
        if not all_finite(found):
            raise ValueError(f"{self.path}: {name} holds values that are not finite: the training has diverged")
        return found

    def layers(self) -> list[str]:
        """The adapted layers."""
        parts = (name.rpartition(".") for name in self.files)
        return list(dict.fromkeys(layer for layer, _, role in parts if role in ROLES))


@prepares
@ordinary()
def import_sorsa(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> Adapter:
    """Attach what SORSA's own package (``sorsa`` 1.0, github.com/Gunale0926/SORSA) has saved. It need not be installed.

    Args:
        model: the base that it was trained on, in the precision in which the package was given it; unchanged if
            anything is wrong.
        folder: with ``config.json`` and ``model.safetensors``, or several such files and their index.
        name: of the adapter.

    Returns:
        The adapter, of the method ``SORSA`` with rank, α and dropout of the folder. Its outputs are the package's where
        that has kept R in float32. R in bfloat16 is W0 − start plus a rounding that the package's outputs have and
        these have not: a warning says how large it is. γ is no part of a checkpoint: a training that goes on takes the
        method's own.

    Raises:
        ValueError: no checkpoint of the package, a tensor without a place, or one that is missing, a field of the
            configuration that is not understood, another base, or a model that was merged before it was saved.

    Example:
        >>> import_sorsa(model, "runs/llama2_sorsa_r128/checkpoint")  # doctest: +SKIP
        Adapter(default: SORSA(rank=128) on 224 sites)
    """
    model, found = unwrapped(model), read(Path(folder))
    survey = Survey.of(model, [], (), ())
    weights = {f"{w.name}.{w.parameter}".lstrip("."): w for w in survey.weights}
    layers = found.layers()
    _check_rest(found, model, layers)
    if not layers:
        raise ValueError(f"{found.path} has no {', '.join(ROLES)}: it adapts nothing")
    record, built, rounded = records(), [], {}
    for layer in layers:
        weight = weights.get(f"{layer}.weight".lstrip("."))
        if weight is None or not isinstance(weight.module, nn.Linear):
            raise ValueError(f"{found.path} adapts {layer}, which is no linear layer of this model")
        if (why := survey.why_not_adaptable(weight)) is not None:
            raise ValueError(f"{layer} cannot be adapted: {why}")
        if sum(other.tensor is weight.tensor for other in survey.weights) > 1:
            raise ValueError(
                f"{found.path} adapts {layer}, whose weight is tied in this model, and was not in the package"
            )
        if missing := [role for role in ROLES if f"{layer}.{role}" not in found.files]:
            raise ValueError(f"{found.path} lacks {', '.join(missing)} of {layer}")
        *site, rounded[layer] = _site(found, layer, weight, record)
        built.append(tuple(site))
    worst = max(rounded, key=rounded.__getitem__)
    if rounded[worst] > SLACK * torch.finfo(torch.float32).eps:
        warnings.warn(
            f"{found.path} has rounded its frozen weights, and the base here is as it is: they differ by up to "
            f"{rounded[worst]:.1e} of ‖W0‖ (at {worst}), and the outputs by that",
            stacklevel=3,
        )
    pairs = [(choice.name, method) for choice, method, _ in built]
    return install(model, pairs, built, {}, {}, name, "train")


def read(path: Path) -> Checkpoint:
    """Read the configuration of a folder, and which of its files has which tensor.

    Raises:
        ValueError: it is no checkpoint of the package, or damaged.
    """
    if not (path / CONFIG).is_file():
        raise ValueError(f"{path} has no {CONFIG}: it is not what SORSAModel.save_pretrained writes")
    try:
        config = json.loads((path / CONFIG).read_text())
        kind = config.get("model_type") if isinstance(config, dict) else None
        if kind != "sorsa":
            raise ValueError(
                f"{path / CONFIG} has model_type {kind!r}, and a checkpoint of SORSA 'sorsa'; a model that was merged "
                "is a plain one: svdpeft extract makes an adapter of it"
            )
        names = [TENSORS]
        if (path / INDEX).is_file():
            names = sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))
        if missing := [name for name in names if not (path / name).is_file()]:
            raise ValueError(
                f"{path} lacks {', '.join(missing)}; a pytorch_model.bin is written again by "
                "SORSAModel.from_pretrained(…).save_pretrained(…, safe_serialization=True)"
            )
        files = {}
        for name in names:
            with safe_open(path / name, "pt") as file:
                files |= dict.fromkeys(file.keys(), path / name)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged or cut off: {error}") from error
    for name in config:
        if config[name] and name not in (*READ, *SILENT):
            raise ValueError(
                f"{path / CONFIG} says {name}={config[name]!r}: it is not understood of a SORSA checkpoint"
            )
    for name, types in READ.items():
        if type(config.get(name)) not in types:
            raise ValueError(f"{path / CONFIG} says {name}={config.get(name)!r}, which is no number of its kind")
    if strange := [name for name in files if not name.startswith(PREFIX)]:
        raise ValueError(f"{path}: {min(strange)} does not begin with {PREFIX!r}, as all tensors of SORSAModel do")
    return Checkpoint(path, config, {name.removeprefix(PREFIX): file for name, file in files.items()})


def _check_rest(found: Checkpoint, model: nn.Module, layers: list[str]) -> None:
    """Every other tensor is the base's, to the rounding of the coarser of the two, and none is missing."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    base: dict[str, Tensor] = {**dict(model.named_buffers()), **parameters}
    for name in found.files:
        layer, _, role = name.rpartition(".")
        if layer in layers and role in (*ROLES, "weight"):
            continue
        if name not in base:
            raise ValueError(f"{found.path}: {PREFIX}{name} has no place in this model")
        here, there = base[name].detach().cpu(), found.tensor(name)
        if here.shape != there.shape:
            raise ValueError(f"{found.path}: {name} is {list(there.shape)} there, and {list(here.shape)} in this model")
        if not _same(here, there):
            raise ValueError(f"{found.path}: {name} is another in this model: the checkpoint is of another base")
    there = {id(parameters[name]) for name in found.files if name in parameters}
    if lost := [name for name, p in parameters.items() if id(p) not in there]:
        raise ValueError(
            f"{found.path} lacks {PREFIX}{lost[0]}, which this model has: it is of another base, or cut off"
        )


def _same(here: Tensor, there: Tensor) -> bool:
    if not here.is_floating_point() or not there.is_floating_point() or here.dtype == there.dtype:
        return here.dtype == there.dtype and torch.equal(here, there)
    coarser = max((torch.finfo(t.dtype) for t in (here, there)), key=lambda info: info.eps)
    wide = here.double()
    return bool(((wide - there.double()).abs() <= coarser.eps * wide.abs().clamp_min(coarser.smallest_normal)).all())


def _site(found: Checkpoint, layer: str, weight: Weight, record: Any) -> tuple[Choice, PerSite, Factors, float]:
    """A layer as a site, and ‖W0 − start − R‖ / ‖W0‖, which is what R has lost."""
    assert weight.kind is not None
    place = Place(weight.module, weight.parameter, weight.kind)
    values = {role: found.tensor(f"{layer}.{theirs}") for theirs, role in ROLES.items()}
    rank, (m, n) = found.config["rank"], weight.tensor.shape
    frozen = found.tensor(f"{layer}.weight")
    shapes = {"L": (m, rank), "C": (rank,), "A": (rank, n)}
    for role, shape in shapes.items():
        if values[role].shape != shape or frozen.shape != (m, n):
            raise ValueError(
                f"{found.path}: {layer} has tensors of {[list(t.shape) for t in (frozen, *values.values())]}, where "
                f"this model and the configuration's rank ask for {[[m, n], *map(list, shapes.values())]}"
            )
    method = SORSA(rank=rank, alpha=found.config.get("alpha"), dropout=found.config.get("dropout") or 0.0)
    method = method.at(weight.name, m, n)
    seen = given(Choice(weight.name, [place], method), 0, {}, record)
    w0 = seen.weight()
    wide = torch.promote_types(w0.dtype, frozen.dtype)
    start = w0.to(wide) - frozen.to(w0.device, wide)
    if not start.any():
        raise ValueError(f"{found.path}: the weight of {layer} is the base's own: SORSAModel.sorsa_init was not called")
    u, s, vh = truncated_svd(start, rank, seed=seen.seed, where=f"W0 − R of {layer}")
    lost = torch.linalg.matrix_norm(start - (u * s) @ vh)
    norm, eps = torch.linalg.matrix_norm(w0), torch.finfo(torch.float32).eps
    if lost > (SLACK * eps + torch.finfo(frozen.dtype).eps / 2) * norm:
        raise ValueError(
            f"{found.path}: W0 − R of {layer} has more than rank {rank}, by {float(lost / norm):.1e} of ‖W0‖: the "
            "checkpoint is of another base, or of this one in another precision, or it was merged before it was saved"
        )
    tensors = values | {"L0": u, "C0": s / method.scale, "A0": vh}
    tensors = {role: tensor.to(seen.device, seen.dtype) for role, tensor in tensors.items()}
    factors = Factors(tensors, method.trains, seen.shared, seen.shape)
    return Choice(weight.name, [place], method), method, factors, float(lost / norm)
