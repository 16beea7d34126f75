"""Vision models: timm's, with embedded weights or timm's own."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svdpeft.models import convert
from svdpeft.models.own import Architecture, architecture
from svdpeft.registry import near_miss

EMBEDDED = {
    "efficientnet-lite0": "tf_efficientnet_lite0",
    "dinov2-vits14": "vit_small_patch14_dinov2.lvd142m",
}
PROCESSOR_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct")


def build(
    name: str,
    *,
    embedded: bool,
    num_classes: int | None,
    image_size: int | None,
    seed: int,
    weights: bool = True,
) -> tuple[nn.Module, dict[str, Any], str | None]:
    """Build a pretrained timm model; see ``svdpeft.models.load``.

    Args:
        name: embedded name where ``embedded``, else timm's name, ``NAME@state_dict.pth`` or ``local-dir:FOLDER``.
        embedded: whether the weights come out of the embedded files, or through timm from the hub.
        num_classes: size of a fresh classifier; None keeps the model's own.
        image_size: side of the square input, pixels; None keeps the model's own.
        seed: of the fresh classifier.
        weights: ``False``: on the meta device.

    Returns:
        The model, its data configuration, the name of its classifier (None where it has not exactly one).
    """
    import timm
    from timm.data import resolve_model_data_config
    from timm.layers import resample_abs_pos_embed

    source = Architecture(EMBEDDED[name], EMBEDDED[name]) if embedded else architecture(name)
    timm_name = source.base
    config = _config(timm_name, weights=weights and not embedded and source == Architecture(name, name))
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes {num_classes} is below 1 for {name!r}")
    head = config.classifier if isinstance(config.classifier, str) else None  # distilled ones have two
    if num_classes is not None and head is None:
        raise ValueError(f"{name!r} has no single classifier but {config.classifier!r}: num_classes cannot be set")
    if image_size is not None:
        _check_size(image_size, timm_name)
    # A convolutional network takes any size as it is, and timm's constructors for them know no img_size.
    sized: dict[str, Any] = {"img_size": image_size} if image_size is not None and config.fixed_input_size else {}
    state = None if source.file is None else _state(source.file)
    # Where every tensor is about to be replaced, drawing random ones first would take most of the time.
    with torch.device("meta") if embedded or not weights else nullcontext():
        found = weights and not embedded and source.file is None
        more: dict[str, Any] = sized | _classes(state, head)
        model: Any = timm.create_model(source.name, pretrained=found, **more)
    if state is not None and weights:
        _read(model, state, source)
    if embedded and weights:
        tensors = convert.state_dict(name, timm_name)
        if config.fixed_input_size:  # as it is where the size is the pretrained one
            grid, others = model.patch_embed.grid_size, model.num_prefix_tokens
            tensors["pos_embed"] = resample_abs_pos_embed(tensors["pos_embed"], grid, num_prefix_tokens=others)
        model.load_state_dict(tensors, strict=True, assign=True)
    if num_classes is not None:
        # Seeded here, so that the classifier depends on its shape and the seed alone.
        torch.default_generator.manual_seed(seed)
        with nullcontext() if weights else torch.device("meta"):
            model.reset_classifier(num_classes)
    processor = {key: value for key, value in resolve_model_data_config(model).items() if key in PROCESSOR_KEYS}
    if image_size is not None:
        processor["input_size"] = (3, image_size, image_size)
    return model, processor, head if model.num_classes else None


def _classes(state: dict[str, Any] | None, head: str | None) -> dict[str, int]:
    """The number of classes of a state dict's own classifier, so that it fits."""
    weight = None if state is None else state.get(f"{head}.weight")
    return {} if weight is None else {"num_classes": len(weight)}


def _state(file: Path) -> dict[str, Any]:
    """A state dict, from safetensors or ``torch.save``, as it is or under the usual words of a checkpoint."""
    from safetensors.torch import load_file

    found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    for word in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(word), dict):
            found = found[word]
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{file} holds no state dict")
    return {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in found.items()}


def _read(model: nn.Module, state: dict[str, Any], source: Architecture) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the tensors of {source.file} are not those of the architecture: {error}") from error


def _config(timm_name: str, weights: bool) -> Any:
    from timm.models import get_pretrained_cfg, is_model, list_models

    base = timm_name.partition(".")[0]
    if not is_model(base):
        raise ValueError(f"timm has no model {timm_name!r}: {near_miss(base, list_models())}")
    config = get_pretrained_cfg(timm_name)
    if config is None or (weights and not config.has_weights):
        raise ValueError(f"timm has no pretrained weights for {timm_name!r}")
    return config


def _check_size(size: int, timm_name: str) -> None:
    """A size that is no multiple of the patch would silently lose the pixels at the border."""
    found = re.search(r"patch(\d+)", timm_name)
    patch = int(found.group(1)) if found else 1
    if size < 1 or size % patch:
        near = " or ".join(str(n) for n in (size // patch * patch, (size // patch + 1) * patch) if n > 0)
        raise ValueError(
            f"image_size {size} is not a positive multiple of the patch size {patch} of {timm_name}: take {near}"
        )
