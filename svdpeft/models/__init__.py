"""Pretrained models by name: embedded ones that need no hub, timm's, transformers', and local folders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from svdpeft.adapter import quantising
from svdpeft.models import language, rwkv, vision
from svdpeft.models.own import architecture_of, build, is_factory
from svdpeft.registry import near_miss

__all__ = ["Loaded", "load"]


@dataclass(frozen=True)
class Loaded:
    """A pretrained model and what belongs to it.

    Args:
        model: in evaluation mode.
        name: the name that it was loaded by.
        processor: the tokenizer of a language model, for an RWKV file the one that its number of tokens tells (256:
            bytes, 65,536: RWKV's World vocabulary; another: None); of a vision model its data configuration, a dict
            of ``input_size`` (3, height, width), ``mean``, ``std``, ``interpolation`` and ``crop_pct``.
        modality: what goes in.
        head: dotted name of the classifier; None where there is none, or not exactly one.
        fresh: dotted names of what else was drawn with a new classifier, and is to be trained with it.
    """

    model: nn.Module
    name: str
    processor: Any
    modality: Literal["vision", "language"]
    head: str | None
    fresh: tuple[str, ...] = ()


def load(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    weights: bool = True,
    trust_remote_code: bool = False,
    quantize: str | None = None,
) -> Loaded:
    """Load a pretrained model by name, on the CPU and in evaluation mode.

    The global random state is left as it was.

    Args:
        name: an embedded model (``"efficientnet-lite0"``, ``"dinov2-vits14"``, ``"smollm2-135m"``,
            ``"minilm-l6"``), ``"timm:NAME"`` or ``"hf:NAME"`` (a causal language model) from the hub, a local
            folder in transformers' or timm's layout, ``"timm:NAME@FILE"``, a state dict of an architecture of
            timm's, an RWKV file in the official layout (``.pth`` or ``.safetensors``), or
            ``"package.module:function"``, which returns a module or a ``Loaded``.
        num_classes: size of a fresh classifier; None keeps a vision model's own, and puts none on a language model.
        image_size: vision: side of the square input, pixels; position embeddings are resampled to it.
        dtype: of the weights.
        seed: of the fresh classifier.
        weights: ``False`` makes the architecture alone, on the meta device and without a tokenizer: of a hub's model
            the configuration is fetched and nothing else, and the name of a configuration of transformers', a
            ``.json`` file, will do. An RWKV file and a function are read as they are.
        trust_remote_code: whether Python files that lie beside a transformers model are run; a model that needs them
            is refused without.
        quantize: a scheme of ``svdpeft.quantize``, by which every ``nn.Linear`` but the head is stored.

    Raises:
        ValueError: unknown name or scheme, a size that is no multiple of the patch, or an option that the model does
            not have.
        AssetError: an embedded model cannot be fetched.
        ImportError: the package that runs this version of RWKV, or has its vocabulary, is not installed.

    Example:
        >>> load("dinov2-vits14", num_classes=10, image_size=98).head  # doctest: +SKIP
        'head'
    """
    loaded = _load(name, num_classes, image_size, dtype, seed, weights, trust_remote_code)
    if quantize is not None:
        quantising.quantize(loaded.model, scheme=quantize, iterations=0, nuclear=False)
    return loaded


def _load(
    name: str,
    num_classes: int | None,
    image_size: int | None,
    dtype: torch.dtype,
    seed: int,
    weights: bool,
    trust_remote_code: bool,
) -> Loaded:
    if is_factory(name):
        return _of_factory(name, num_classes=num_classes, image_size=image_size, dtype=dtype)
    if architecture_of(Path(name)) is not None:
        name = f"timm:local-dir:{name}"
    origin, _, rest = name.partition(":")
    hub = rest if origin in ("timm", "hf") else ""
    configuration = Path(name).suffix == ".json" and Path(name).is_file()
    if configuration and weights:
        raise ValueError(f"{name} is a configuration, which has no weights: name the folder that it lies in")
    folder = Path(name, "config.json").is_file() or configuration
    checkpoint = not hub and not folder and Path(name).suffix in rwkv.SUFFIXES
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU before the pretrained ones replace them
        if name in vision.EMBEDDED or (hub and origin == "timm"):
            model, processor, head = vision.build(
                hub or name,
                embedded=not hub,
                num_classes=num_classes,
                image_size=image_size,
                seed=seed,
                weights=weights,
            )
            return Loaded(model.to(dtype).eval(), name, processor, "vision", head)
        if name in language.EMBEDDED or hub or folder or checkpoint:
            if image_size is not None:
                raise ValueError(f"image_size={image_size} is for vision models; {name!r} is a language model")
            if checkpoint:
                if num_classes is not None:
                    raise ValueError(f"num_classes={num_classes}: an RWKV file has no classifier")
                from svdpeft.models.rwkv_text import tokenizer

                model: Any = rwkv.build(name).to(dtype)
                return Loaded(model, name, tokenizer(model.config.vocab_size), "language", None)
            model, tokenizer, new = language.build(
                hub or name,
                hub=bool(hub),
                dtype=dtype,
                num_classes=num_classes,
                seed=seed,
                weights=weights,
                trust_remote_code=trust_remote_code,
            )
            return Loaded(model.eval(), name, tokenizer, "language", new[-1] if new else None, new[:-1])
    if Path(name).is_dir():
        raise ValueError(f"the folder {name!r} has no config.json: not a model in transformers' layout")
    known = [*vision.EMBEDDED, *language.EMBEDDED, "timm:NAME", "hf:NAME"]
    raise ValueError(f"no model is called {name!r}, and no such folder exists: {near_miss(name, known)}")


def _of_factory(name: str, *, num_classes: int | None, image_size: int | None, dtype: torch.dtype) -> Loaded:
    """What a function of the user's returns, as a ``Loaded``: a bare module sees pictures as timm's do."""
    made = build(name, {"num_classes": num_classes, "image_size": image_size})
    if isinstance(made, Loaded):
        return replace(made, model=made.model.to(dtype).eval(), name=name)
    from timm.data import resolve_model_data_config

    config = {k: v for k, v in resolve_model_data_config(made).items() if k in vision.PROCESSOR_KEYS}
    if image_size is not None:
        config["input_size"] = (3, image_size, image_size)
    layers = [layer for layer, module in made.named_modules() if isinstance(module, nn.Linear)]
    return Loaded(made.to(dtype).eval(), name, config, "vision", layers[-1] if layers else None)
