"""A folder of Hugging Face PEFT: its configuration, its tensors by layer, and what of the configuration is understood.

Every field is one of three: it is read; it changes nothing of the function that the tensors do not say themselves; or
it must be off, which null, false and empty are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from svdpeft.adapter.file import read_tensors
from svdpeft.decomposition import all_finite
from svdpeft.patterns import expression

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE = ".base_layer"  # PEFT's name for a layer within the one that it puts around it
ROWS = "token_adapter.trainable_tokens_delta"
MERGE = "or merge it with PEFT, merge_and_unload(), and load the merged model"


def _fields(*lines: str) -> frozenset[str]:
    return frozenset(name for line in lines for name in line.split())


SILENT = _fields(  # which layers there are the tensors say, and the rest is nothing of the function
    "peft_type peft_version task_type auto_mapping base_model_name_or_path revision inference_mode target_modules",
    "exclude_modules modules_to_save layers_to_transform layers_pattern bias fan_in_fan_out init_weights",
    "ensure_weight_tying megatron_core runtime_config loftq_config eva_config corda_config lora_ga_config",
    "qalora_group_size rank_pattern r",
)
LORA = _fields("lora_alpha lora_dropout init_lora_weights alpha_pattern trainable_token_indices")
READ = {  # what beside those is read, or has done its work when the adapter is saved
    "LORA": LORA | _fields("use_rslora use_dora target_parameters"),
    "ADALORA": LORA | _fields("init_r orth_reg_weight target_r tinit tfinal deltaT beta1 beta2 total_step"),
    "VERA": _fields("d_initial vera_dropout projection_prng_key save_projection"),
    "RANDLORA": _fields("randlora_alpha randlora_dropout projection_prng_key save_projection sparse very_sparse"),
    "OFT": _fields("oft_block_size module_dropout coft eps block_share use_cayley_neumann", "num_cayley_neumann_terms"),
    "BOFT": _fields("boft_block_size boft_block_num boft_n_butterfly_factor boft_dropout"),
    "LN_TUNING": _fields(),
}
ROLES = {  # what the tensors of a layer are called behind its name, longest first where one ends like another
    "LORA": (
        *("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"),
        *("lora_magnitude_vector.weight", "lora_magnitude_vector"),
    ),
    "ADALORA": ("lora_A", "lora_B", "lora_E"),
    "VERA": ("vera_lambda_b", "vera_lambda_d"),
    "RANDLORA": ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),  # the bases again, in each layer
    "OFT": ("oft_R.weight", "oft_embedding_R.weight"),
    "BOFT": ("boft_R", "boft_s"),
    "LN_TUNING": (),
}
SHARED = {"VERA": ("vera_A", "vera_B"), "RANDLORA": ("randlora_A", "randlora_B")}  # of the whole model


@dataclass(frozen=True)
class Folder:
    """What a folder holds.

    Args:
        path: of it, for messages.
        config: the configuration.
        layers: name of a layer, with PEFT's own ``base_layer`` in it -> role -> tensor.
        shared: tensors of the whole model, by role.
        rows: layer -> the rows of its weight that were trained alone.
        saved: name of a tensor of the base -> its value.
    """

    path: Path
    config: Mapping[str, Any]
    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """PEFT's name for the method."""
        return self.config["peft_type"]

    def __getitem__(self, name: str) -> Any:
        if name not in self.config:
            raise ValueError(f"{self.path / CONFIG} lacks {name!r}, which an adapter of type {self.kind} has")
        return self.config[name]

    def shared_tensor(self, role: str) -> Tensor:
        """A tensor of the whole model."""
        if role not in self.shared:
            raise ValueError(f"{self.path / TENSORS} lacks {role}")
        return self.shared[role]

    def trained(self, name: str) -> bool:
        """Whether a tensor of the base was trained whole."""
        if self.kind == "LN_TUNING" or (self.config.get("bias", "none") != "none" and name.endswith(".bias")):
            return True
        modules = tuple(self.config.get("modules_to_save") or ())
        parts = name.split(".")
        return any(".".join(parts[:i]).endswith(modules) for i in range(1, len(parts)))

    def refuse(self, name: str, why: str, way_out: str = MERGE) -> NoReturn:
        """Say that a field of the configuration has no counterpart."""
        raise ValueError(f"{self.path / CONFIG} says {name}={self.config.get(name)!r}: {why}; {way_out}")

    def for_layer(self, patterns: str, layer: str, default: Any) -> Any:
        """A layer's value in one of PEFT's mappings from pattern to value: the first that its name ends with."""
        found = self.config.get(patterns) or {}
        return next((v for key, v in found.items() if expression(rf"(?:.*\.)?(?:{key})").matches(layer)), default)


def read(path: Path) -> Folder:
    """Read a folder that ``PeftModel.save_pretrained`` has written.

    Raises:
        ValueError: no such folder, a method that is not known here, a field that is not.
    """
    if missing := [name for name in (CONFIG, TENSORS) if not (path / name).is_file()]:
        raise ValueError(
            f"{path} is not an adapter folder of PEFT: it lacks {' and '.join(missing)}; it is what "
            "PeftModel.save_pretrained writes"
        )
    try:
        config = json.loads((path / CONFIG).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path / CONFIG} is damaged or cut off: {error}") from error
    _, tensors = read_tensors(path / TENSORS)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in READ:
        raise ValueError(f"{path / CONFIG} has peft_type {kind!r}; known are {', '.join(READ)}; {MERGE}")
    folder = Folder(path, config)
    for name in config:
        if config[name] and name not in SILENT | READ[kind]:
            folder.refuse(name, f"it is not understood of {kind}")
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise ValueError(f"{path / TENSORS}: {name} holds values that are not finite: the training has diverged")
        _sort(folder, name, tensor)
    return folder


def _sort(folder: Folder, key: str, tensor: Tensor) -> None:
    """Put a tensor where it belongs."""
    if (shared := key.removeprefix("base_model.")) in SHARED.get(folder.kind, ()):
        folder.shared[shared] = tensor
        return
    name = key.removeprefix(PREFIX)
    for role in ROLES[folder.kind]:
        if name.endswith(f".{role}"):
            layer = name.removesuffix(f".{role}")
            folder.layers.setdefault(layer, {})[role.removesuffix(".weight")] = tensor
            return
    if name.endswith(f".{ROWS}"):
        folder.rows[plain(name.removesuffix(f".{ROWS}"))] = tensor
    else:
        folder.saved[plain(name.replace(".ln_tuning_layers.", "."))] = tensor


def plain(name: str) -> str:
    """A name in the base model."""
    return name.replace(BASE, "")


def parameter_of(folder: Folder, layer: str, model: nn.Module) -> tuple[str, str]:
    """Return which parameter of which layer the tensors of ``layer`` are for.

    Of several parameters of one module PEFT wraps the first innermost: each is one ``base_layer`` further in than the
    next of the module's that is adapted.
    """
    name = plain(layer)
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{folder.path / TENSORS} adapts {name}, which this model does not have") from None
    targets = folder.config.get("target_parameters") or ()
    parameters = [p for p, t in module._parameters.items() if t is not None]
    adapted = [p for p in parameters if any(f".{name}.{p}".endswith(f".{target}") for target in targets)]
    depth = 0
    while layer.endswith(BASE * (depth + 1)):
        depth += 1
    if adapted and depth >= len(adapted):
        raise ValueError(f"{folder.path / TENSORS} adapts more parameters of {name} than target_parameters names")
    above = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.MultiheadAttention) or isinstance(above, nn.MultiheadAttention):
        raise ValueError(
            f"{folder.path / TENSORS} adapts {name}: in an nn.MultiheadAttention PEFT adds the update of out_proj "
            "twice, or never where it is named alone, so that there is no saying what was trained"
        )
    return name, adapted[-1 - depth] if adapted else "weight"
