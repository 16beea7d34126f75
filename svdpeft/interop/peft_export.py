"""Export to the LoRA format of Hugging Face PEFT: what any serving stack that knows LoRA can load.

The update of every weight is ΔW = W' − W0 on the *original* weight, compressed to its exact rank by QR of the thin
factors, so the exported adapter is the trained one up to rounding, whatever the method was. Beside it PEFT holds layers
that were trained whole (``modules_to_save``), single rows of an embedding (``trainable_token_indices``) and biases.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.saving import Contents
from svdpeft.atomic import replacing
from svdpeft.interop.lora import contents_of
from svdpeft.interop.peft_folder import CONFIG, PREFIX, ROWS, TENSORS
from svdpeft.interop.peft_updates import Update, updates_of
from svdpeft.layers.part import Part
from svdpeft.sites.site import Site
from svdpeft.sites.weights import stored
from svdpeft.targets.inventory import users_of_parameters

TASKS = {  # PEFT's words for what the classes of transformers are for
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
SERVED = 16  # the largest rank that vLLM takes unless it is told another


@dataclass(frozen=True)
class Exported:
    """What ``export_lora`` has written.

    Args:
        path: of the folder.
        ranks: weight -> the rank of its LoRA.
        lost: weight -> ‖ΔW − ΔW_r‖_F / ‖ΔW‖_F, what ``max_rank`` leaves out; 0 up to rounding without it.
        notes: what software that reads the folder may want to be told.
    """

    path: Path
    ranks: Mapping[str, int]
    lost: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        words = [
            f"LoRA of {len(self.ranks)} weights, rank {' to '.join(str(r) for r in ranks[:: max(len(ranks) - 1, 1)])}"
        ]
        worst = max(self.lost, key=lambda name: self.lost[name], default="")
        if worst and self.lost[worst] > 1e-6:
            words.append(f"at most {self.lost[worst]:.2%} of an update is lost, at {worst}")
        return "; ".join([f"{self.path}: {words[0]}", *words[1:], *self.notes])


def export_ranks(adapter: Adapter | Contents, max_rank: int | None = None) -> dict[str, int]:
    """Return the rank of each weight's update, which is the rank that ``export_lora`` writes.

    Args:
        adapter: as for ``export_lora``.
        max_rank: as for ``export_lora``.

    Raises:
        ValueError: the adapter is not a LoRA: see ``export_lora``.
    """
    return _Plan.of(adapter, max_rank).ranks


def export_lora(adapter: Adapter | Contents, path: str | os.PathLike[str], max_rank: int | None = None) -> Exported:
    """Write the adapter as a PEFT LoRA folder (``adapter_config.json``, ``adapter_model.safetensors``).

    Parts of a fused weight become one LoRA of the whole, experts ``target_parameters``, what is trained whole
    ``modules_to_save``, rows of an embedding ``trainable_token_indices``, biases of adapted layers
    ``bias="lora_only"``.

    Args:
        adapter: in any state; or what ``svdpeft.folders.opened`` gives of one that is on the disk with its model.
        path: of the new folder.
        max_rank: take the nearest update of this rank where one has a larger; ``None`` is the exact rank, and refuses a
            method whose update has full rank.

    Returns:
        The rank of each weight, as ``export_ranks`` states it beforehand, and what the nearest updates lack.

    Raises:
        ValueError: a LoRA file cannot hold it: an update of full rank, a convolution that PEFT computes otherwise, a
            weight that is read and not called, a part of an adapted layer that is trained whole.
        FileExistsError: ``path`` exists.

    Example:
        >>> adapter = svdpeft.attach(nn.Sequential(nn.Linear(6, 4)), svdpeft.PiSSA(rank=2))
        >>> for p in adapter.parameters():
        ...     p.data = p.data + torch.randn_like(p)
        >>> print(export_lora(adapter, getfixture("tmp_path") / "lora").ranks)  # L and A moved: twice the rank
        {'0': 4}
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists: an export does not overwrite")
    plan = _Plan.of(adapter, max_rank)
    with replacing(path) as new:
        new.mkdir()
        tensors = {f"{PREFIX}{name}": tensor for name, tensor in plan.tensors().items()}
        save_file(tensors, new / TENSORS, metadata={"format": "pt"})
        (new / CONFIG).write_text(json.dumps(plan.config(), indent=1) + "\n")
    lost = {update.name: update.lost for update in plan.updates}
    return Exported(path, plan.ranks, lost, tuple(plan.notes()))


@dataclass(frozen=True)
class _Plan:
    """What of an adapter is written, checked.

    Args:
        adapter: what is exported of it.
        version: gives what it, or else the base, holds of a tensor of the model by its name; ``None``: the model's own.
        updates: of weights.
        rows: layer -> the site of its rows, and all layers that have the weight.
        replaced: weight -> what it is as a whole, where that is a site's.
        modules: layers that are written whole.
        biases: names of the biases of adapted layers.
    """

    adapter: Contents
    version: Callable[[str], Tensor | None]
    updates: Sequence[Update]
    rows: Mapping[str, tuple[Site, tuple[str, ...]]]
    replaced: Mapping[str, Tensor]
    modules: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, adapter: Adapter | Contents, max_rank: int | None) -> _Plan:
        """Look at an adapter.

        Raises:
            ValueError: PEFT's format has no place for something.
        """
        if max_rank is not None and (isinstance(max_rank, bool) or not isinstance(max_rank, int) or max_rank < 1):
            raise ValueError(f"max_rank {max_rank!r} is not a whole number of at least 1")
        contents = contents_of(adapter)
        version = adapter.own.version if isinstance(adapter, Adapter) else contents.values.get
        plan = cls(contents, version, *updates_of(contents, max_rank))
        plan._sort_whole()
        if not plan.updates:
            raise ValueError(f"adapter {contents.name!r} has no factors that a LoRA holds: there is nothing to export")
        return plan

    def _sort_whole(self) -> None:
        """Put what was trained whole where PEFT has a place for it."""
        model = self.adapter.model
        places = [model.get_submodule(name) for name in self.layers]
        users = users_of_parameters(model)
        uses = {name: [name.rpartition(".")[::2]] for name in self.replaced}
        for name in self.adapter.values:
            owner, _, attribute = name.rpartition(".")
            uses[name] = users.get(id(stored(model.get_submodule(owner), attribute)), [(owner, attribute)])
        for name, places_of in uses.items():
            for layer, key in places_of:
                module = model.get_submodule(layer)
                if module in places and key == "bias":
                    self.biases.append(f"{layer}.bias")
                elif not layer or any(place in module.modules() for place in places):
                    raise ValueError(
                        f"{name} is trained whole, and belongs to a module that is adapted, or has one in it: "
                        "PEFT saves layers as a whole; merge the adapter instead"
                    )
                elif layer not in self.modules:
                    self.modules.append(layer)
        names = [name for name, _ in model.named_modules(remove_duplicate=False)]
        for name in [n for n in names if n.endswith(tuple(self.modules or "\0")) and n not in self.modules]:
            if any(place in model.get_submodule(name).modules() for place in places):  # PEFT takes a name for an ending
                raise ValueError(f"{name} is adapted, and ends as the name of a layer that is trained whole does")
            self.modules.append(name)

    @property
    def layers(self) -> list[str]:
        """Names of the adapted layers."""
        return [layer for update in self.updates for layer in update.layers] + [
            layer for _, layers in self.rows.values() for layer in layers
        ]

    @property
    def ranks(self) -> dict[str, int]:
        """Weight -> rank."""
        return {update.name: update.product.rank for update in self.updates}

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by PEFT's names without their beginning."""
        found: dict[str, Tensor] = {}
        nested: dict[str, list[Update]] = {}
        for update in self.updates:
            if update.parameter is None:
                found |= update.tensors()
            else:
                nested.setdefault(update.layers[0], []).append(update)
        for layer, its in nested.items():  # the first parameter of the module is innermost
            order = list(self.adapter.model.get_submodule(layer)._parameters)
            its.sort(key=lambda update: order.index(str(update.parameter)), reverse=True)
            for depth, update in enumerate(its):
                for name, tensor in update.tensors().items():
                    found[f"{layer}{'.base_layer' * depth}{name.removeprefix(layer)}"] = tensor
        for layer, (site, _) in self.rows.items():
            for name in self._own_rows(layer):
                found[f"{name}.{ROWS}"] = site.factors.W.detach().clone()
        for name in self.biases:
            layer = name.removesuffix(".bias")
            found[f"{layer}.base_layer.bias"] = self._value(name)
        for module in self.modules:
            for key in self.adapter.model.get_submodule(module).state_dict():
                found[f"{module}.{key}"] = self._value(f"{module}.{key}")
        return found

    def _value(self, name: str) -> Tensor:
        """What the adapter, or else the base, holds of a tensor of the model."""
        if name in self.replaced:
            return self.replaced[name]
        owner, _, attribute = name.rpartition(".")
        here = stored(self.adapter.model.get_submodule(owner), attribute)
        first = next((n for n, p in self.adapter.model.named_parameters() if p is here), name)
        version = self.version(first)
        return (here if version is None else version).detach().clone().contiguous()

    def _own_rows(self, layer: str) -> Sequence[str]:
        """The layers that PEFT gives rows: of a model that says that it ties them, the others follow by themselves."""
        config = getattr(self.adapter.model, "config", None)
        return [layer] if getattr(config, "tie_word_embeddings", False) else self.rows[layer][1]

    def config(self) -> dict[str, Any]:
        """The configuration."""
        keys = {
            (layer if update.parameter is None else f"{layer}.{update.parameter}"): update.product.rank
            for update in self.updates
            for layer in update.layers
        }
        rank = max(keys.values())  # what a server that asks for one number has to make room for
        # PEFT takes a key for a suffix.
        suffixes = {name for name in keys if any(other.endswith(f".{name}") for other in keys)}
        patterns = {f"^{n}$" if n in suffixes else n: r for n, r in keys.items() if r != rank}
        return {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,  # scale one: it is inside the factors
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
            "target_modules": self._targets(),
            "target_parameters": [
                key for update in self.updates if update.parameter for key in self._parameters(update)
            ],
            "modules_to_save": self.modules or None,
            "trainable_token_indices": {
                name: _indices(site) for layer, (site, _) in self.rows.items() for name in self._own_rows(layer)
            }
            or None,
            "fan_in_fan_out": any(update.site.kind.name == "hf-conv1d" for update in self.updates),
            "bias": "lora_only" if self.biases else "none",
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            "use_dora": False,
            "use_rslora": False,
            "inference_mode": True,
            **_base(self.adapter.model),
        }

    def _parameters(self, update: Update) -> list[str]:
        return [f"{layer}.{update.parameter}" for layer in update.layers]

    def _targets(self) -> list[str] | str:
        """The names of the layers; PEFT takes those of a list for suffixes, so that where one is, a pattern says it."""
        layers = [layer for update in self.updates if update.parameter is None for layer in update.layers]
        names = [name for name, _ in self.adapter.model.named_modules()]
        if any(name.endswith(f".{layer}") and name not in layers for layer in layers for name in names):
            return "|".join(map(re.escape, layers))  # PEFT matches a string as a whole
        return layers

    def notes(self) -> list[str]:
        """What software that reads it may want to be told."""
        found = []
        largest = max(self.updates, key=lambda update: update.product.rank)
        if (rank := largest.product.rank) > SERVED:
            found.append(
                f"rank {rank} at {largest.name}: vLLM takes {SERVED} at most unless it is started with "
                f"--max-lora-rank {rank}, and max_rank={SERVED} here writes the nearest update that it takes"
            )
        if self.modules or self.rows or self.biases:
            found.append("vLLM and other servers of LoRA leave out, or refuse, what is saved whole")
        if tied := next((update for update in self.updates if len(update.layers) > 1), None):
            found.append(
                f"{' and '.join(tied.layers)} share a weight: PEFT computes with each update, and its merge adds both"
            )
        return found


def _indices(site: Site) -> list[int]:
    assert isinstance(site.kind, Part)
    return [row for rows in site.kind.rows for row in range(*rows)]


def _base(model: nn.Module) -> dict[str, Any]:
    """What PEFT's Auto classes need to know of the base: where it is from, and of which class."""
    path = getattr(model, "name_or_path", None) or None
    name = type(model).__name__
    task = next((task for suffix, task in TASKS.items() if name.endswith(suffix)), None)
    library = type(model).__module__
    mapping = None if task else {"base_model_class": name, "parent_library": library}
    return {"base_model_name_or_path": path, "task_type": task, "auto_mapping": mapping}
