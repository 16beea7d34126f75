"""RWKV checkpoints in the official layout: read, build the model, copy into a model and back, write.

The official layout is that of BlinkDL's ``.pth`` files, which the programs that run RWKV read. Implementations differ
from it in names, shapes and orientation (see ``rwkv_layout``), so a merged model is translated back when it is written.
"""

from __future__ import annotations

import importlib
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from svdpeft.adapter.file import undamaged
from svdpeft.adapter.roster import adapters_in
from svdpeft.atomic import replacing
from svdpeft.models import rwkv_layout

SUFFIXES = (".pth", ".pt", ".safetensors")
REFUSED = {
    "attached": "its update would be missing from the file; merge() first",
    "merged": "its update is part of the weights; unmerge() first",
    "folded": "the weights are residuals; unfold() first",
}


class Shape(NamedTuple):
    """Version and sizes of a checkpoint; RWKV-4 has no heads."""

    version: int
    layers: int
    width: int
    ffn: int
    vocab: int
    heads: int | None
    head_size: int | None


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a checkpoint; nothing in it is executed, and a ``.pth`` is mapped into memory rather than copied.

    Args:
        path: of a ``.pth``, ``.pt`` or ``.safetensors`` file in the official layout.

    Returns:
        Tensors on the CPU by official name.

    Raises:
        ValueError: another suffix, a damaged file, or no RWKV checkpoint.
        OSError: it cannot be read.
    """
    path = _checked(path)
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # torch's unpickler, which is not ours, says no less of what it may raise
        raise ValueError(f"{path} is damaged, or holds more than tensors: {error}") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{path} is no RWKV checkpoint: it is not a mapping from names to tensors")
    if large := [name for name, value in state.items() if value.nbytes > value.untyped_storage().nbytes()]:
        raise ValueError(f"{path} is damaged: {large[0]} is larger than what the file holds of it")
    with undamaged(path, kind=ValueError):
        describe(state)
    return dict(state)


def describe(state: Mapping[str, Tensor]) -> Shape:
    """Tell version and sizes of a checkpoint from the names and shapes of its tensors.

    Raises:
        ValueError: no RWKV checkpoint, or an incomplete one; says what is missing.

    Example:
        >>> shapes = {"emb": (9, 4), "blocks.0.att.key": (4, 4), "blocks.0.ffn.key": (8, 4), "blocks.0.att.r_k": (2, 2)}
        >>> describe({k if "r_k" in k else f"{k}.weight": torch.ones(v) for k, v in shapes.items()})
        Shape(version=7, layers=1, width=4, ffn=8, vocab=9, heads=2, head_size=2)
    """
    names = {name.removeprefix("blocks.0.att.") for name in state if name.startswith("blocks.0.att.")}
    marks = {"r_k": 7, "time_aaa_w1": 0, "time_maa_x": 6, "ln_x.weight": 5, "time_first": 4}
    found = next((number for mark, number in marks.items() if mark in names), None)
    if found is None or "emb.weight" not in state:
        missing = "emb.weight" if found else "any of " + ", ".join(f"blocks.0.att.{mark}" for mark in marks)
        raise ValueError(f"no RWKV checkpoint in the official layout: it lacks {missing} and has {list(state)[:3]}")
    if not found:
        raise ValueError("a preview of RWKV-7, with blocks.0.att.time_aaa_w1; only its final names, with a1, are known")
    try:
        vocab, width = state["emb.weight"].shape
        ffn, attention = (state[f"blocks.0.{part}.key.weight"].shape[0] for part in ("ffn", "att"))
        per_head = "r_k" if found == 7 else "time_faaaa" if "time_faaaa" in names else "time_first"
        heads = None if found == 4 else state[f"blocks.0.att.{per_head}"].shape[-2:][0]
    except KeyError as error:
        raise ValueError(f"no complete RWKV-{found} checkpoint: it lacks {error.args[0]}") from error
    layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return Shape(found, layers, width, ffn, vocab, heads, heads and attention // heads)


def build(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> nn.Module:
    """Build the model of a checkpoint: on the CPU, in the file's dtype, in evaluation mode.

    RWKV-4 has the layers of transformers' ``RwkvForCausalLM``, RWKV-6 those of ``rwkv_simple.RWKV`` (package
    ``rwkv-simple``), RWKV-7 becomes ``rwkv7_hf.RWKV7ForCausalLM`` (package ``rwkv7-hf``). All are language models of
    transformers: they take an attention mask and labels, and ``generate``.

    Args:
        source: path of a checkpoint, or its tensors, which are copied.

    Raises:
        ValueError: not a checkpoint, RWKV-5, or other tensors than the implementation has.
        ImportError: the package for this version is missing; says how to install it.
    """
    state = source if isinstance(source, Mapping) else read(source)
    shape = describe(state)
    if shape.version not in BUILDERS:
        text = f"no implementation of RWKV-{shape.version} is known, only of versions {', '.join(map(str, BUILDERS))}"
        raise ValueError(f"{text}; load_state(model, state) fills a model of your own that has the official names")
    try:
        with torch.device("meta"):  # nothing is drawn and allocated only to be replaced
            model = BUILDERS[shape.version](state, shape)
    except KeyError as error:
        raise ValueError(f"no complete RWKV-{shape.version} checkpoint: no {error.args[0].split()[-1]}") from error
    views = rwkv_layout.from_official(model, state).items()
    model.load_state_dict({key: view.clone(memory_format=torch.contiguous_format) for key, view in views}, assign=True)
    rwkv_layout.keep(model, state)
    return model.eval()


@torch.no_grad()
def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy official tensors into a model, in the model's own dtypes; an attached adapter stays as it is.

    Args:
        model: transformers' RWKV-4, rwkv-simple's RWKV-6, RWKV-7 of rwkv7-hf or flash-linear-attention, or a module
            whose parameters have the official names.
        state: tensors by official name, as from ``read``.

    Raises:
        ValueError: a tensor is missing, superfluous or does not fit, or an adapter is merged. The model is as it was.
    """
    _refuse(model, "merged", "folded")
    places = model.state_dict()
    for key, value in rwkv_layout.from_official(model, state).items():
        places[key].copy_(value)
    rwkv_layout.keep(model, state)


@torch.no_grad()
def official_state(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return a copy of a model's own weights in the official layout: names, orientation, shapes and order of the file.

    What is merged is part of the weights. An adapter that is only attached is left out.

    Args:
        model: as for ``load_state``. Where no file filled it, the shapes are those of the official training code.
        dtype: of all tensors; None: the one that each has in the model, after ``build`` the file's.

    Raises:
        ValueError: no RWKV model, or something is folded or rescaled in the weights.
    """
    _refuse(model, "folded")
    state = rwkv_layout.to_official(model)
    describe(state)
    return {key: value.to(dtype).clone(memory_format=torch.contiguous_format) for key, value in state.items()}


def write(model: nn.Module, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write a model, usually a merged one, in the official layout; a crash leaves the old file or the new one.

    Args:
        model, dtype: as for ``official_state``.
        path: of a ``.pth``, ``.pt`` or ``.safetensors`` file.

    Raises:
        ValueError: another suffix; an adapter that is not merged, so that its update would be missing from the file.
    """
    path = _checked(path)
    _refuse(model, "attached")
    state = {name: value.cpu() for name, value in official_state(model, dtype).items()}
    with replacing(path) as new:
        save_file(state, new) if path.suffix == ".safetensors" else torch.save(state, new)


def _build4(state: Mapping[str, Tensor], shape: Shape) -> nn.Module:
    from transformers import RwkvConfig, RwkvForCausalLM

    from svdpeft.models.rwkv_text import Rwkv4ForCausalLM

    config = RwkvConfig(vocab_size=shape.vocab, hidden_size=shape.width, num_hidden_layers=shape.layers)
    config.pad_token_id = config.eos_token_id  # 0
    config.intermediate_size, config.attention_hidden_size = shape.ffn, state["blocks.0.att.key.weight"].shape[0]
    config.rescale_every = 0  # else train() and eval() double and halve weights in place, which no adapter survives
    return Rwkv4ForCausalLM(RwkvForCausalLM(config))


def _build6(state: Mapping[str, Tensor], shape: Shape) -> nn.Module:
    from svdpeft.models.rwkv_text import Rwkv6ForCausalLM

    # The package gives its kernel to torch.compile as it is imported: that needs a C++ compiler, compiles anew for each
    # length and rounds otherwise for each. torch reads this variable there and then, so it is set for the import only.
    # Whoever wants the kernel compiled imports rwkv_simple before.
    before = {name: value for name, value in os.environ.items() if name == "TORCHDYNAMO_DISABLE"}
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        package = _package("rwkv_simple.rwkv", "rwkv-simple", 6)
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        os.environ |= before
    expand = (shape.ffn + 0.5) / shape.width  # the package rounds the product down
    model = package.RWKV(shape.width, shape.head_size, expand, n_layer=shape.layers, vocab_size=shape.vocab)
    for i, block in enumerate(model.blocks):  # low-rank widths are constants of the package, but the 7B has larger ones
        for name in ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2"):
            setattr(block.att, name, nn.Parameter(torch.empty_like(state[f"blocks.{i}.att.{name}"], device="meta")))
    return Rwkv6ForCausalLM(model)


def _build7(state: Mapping[str, Tensor], shape: Shape) -> nn.Module:
    package = _package("rwkv7_hf.converter", "rwkv7-hf", 7)
    config = package.infer_config(state, "float32", attn_mode="reference", fuse_norm=False)
    from svdpeft.models.rwkv7 import RWKV7ForCausalLM

    return RWKV7ForCausalLM(config)


BUILDERS: dict[int, Callable[[Mapping[str, Tensor], Shape], nn.Module]] = {4: _build4, 6: _build6, 7: _build7}


def _package(module: str, name: str, number: int) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"RWKV-{number} is run by the package {name}: pip install {name} ({error})") from error


def _refuse(model: nn.Module, *states: str) -> None:
    """Raise where the weights are not the model's own, or where an adapter is in one of these states."""
    for adapter in adapters_in(model):
        if adapter.state in states:
            raise ValueError(f"adapter {adapter.name!r} is {adapter.state}: {REFUSED[adapter.state]}")
    for module in model.modules():
        if vars(module).get("layers_are_rescaled") and (every := vars(module)["config"].rescale_every) > 0:
            why = "transformers has divided weights in place for inference"
            raise ValueError(f"rescale_every={every}: {why}; set it to 0 in the config before the first forward")


def _checked(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is not named as a checkpoint: the suffix must be one of {', '.join(SUFFIXES)}")
    return path
