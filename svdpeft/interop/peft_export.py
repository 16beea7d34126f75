"""Export to the LoRA format of Hugging Face PEFT: what any serving stack that knows LoRA can load.

The update of every site is ΔW = W' − W0 on the *original* weight, compressed to its exact rank by QR of the thin
factors, so the exported adapter is the trained one up to rounding, whatever the method was.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from svdpeft.adapter.adapter import Adapter
from svdpeft.atomic import replacing
from svdpeft.decomposition import Product, exact_rank, recompress
from svdpeft.sites.site import Site

CONV = re.compile(r"conv|conv-same")
TASKS = {  # PEFT's words for what the classes of transformers are for
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
WRITTEN = re.compile(r"linear|hf-conv1d|conv|conv-same")  # the kinds whose LoRA files PEFT can read back


def export_ranks(adapter: Adapter) -> dict[str, int]:
    """Return the rank of each site's update, which is the rank that ``export_lora`` writes.

    Raises:
        ValueError: the adapter is not a LoRA: see ``export_lora``.
    """
    _check(adapter)
    return {name: max(int(exact_rank(_product(site)).max()), 1) for name, site in adapter.sites.items()}


def export_lora(adapter: Adapter, path: str | os.PathLike[str]) -> dict[str, int]:
    """Write the adapter as a PEFT LoRA folder (``adapter_config.json``, ``adapter_model.safetensors``).

    Args:
        adapter: in any state.
        path: of the new folder.

    Returns:
        The rank of each site, as ``export_ranks`` states it beforehand.

    Raises:
        ValueError: a LoRA file cannot hold it: a grouped convolution, a tied weight, parameters trained whole, or
            normalisation statistics that training changed.
        FileExistsError: ``path`` exists.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists: an export does not overwrite")
    ranks = export_ranks(adapter)
    tensors: dict[str, Tensor] = {}
    for name, site in adapter.sites.items():
        lora = recompress(_product(site))
        left, right = lora.L.float(), lora.A.float()  # (1, m, r), (1, r, n) for a convolution, else without the 1
        if CONV.fullmatch(site.kind.name):
            kernel = site.weight.original.shape[1:]
            left = left[0].reshape(*left.shape[1:], *[1] * (len(kernel) - 1))
            right = right[0].reshape(-1, *kernel)
        tensors[f"base_model.model.{name}.lora_A.weight"] = right.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = left.contiguous()
    common = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT takes a key for a suffix.
    suffixes = {name for name in ranks if any(other.endswith(f".{name}") for other in ranks)}
    patterns = {f"^{n}$" if n in suffixes else n: rank for n, rank in ranks.items() if rank != common}
    config = {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,  # scale one: it is inside the factors
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": _targets(adapter),
        "fan_in_fan_out": any(site.kind.name == "hf-conv1d" for site in adapter.sites.values()),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        **_base(adapter.model),
    }
    with replacing(path) as new:
        new.mkdir()
        save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt"})
        (new / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return ranks


def _targets(adapter: Adapter) -> list[str] | str:
    """The names of the sites; PEFT takes those of a list for suffixes, so that where one is, a pattern says it."""
    sites, names = set(adapter.sites), [name for name, _ in adapter.model.named_modules()]
    if any(name.endswith(f".{site}") and name not in sites for site in sites for name in names):
        return "|".join(map(re.escape, adapter.sites))  # PEFT matches a string as a whole
    return list(adapter.sites)


def _base(model: nn.Module) -> dict[str, Any]:
    """What PEFT's Auto classes need to know of the base: where it is from, and of which class."""
    path = getattr(model, "name_or_path", None) or None
    name = type(model).__name__
    task = next((task for suffix, task in TASKS.items() if name.endswith(suffix)), None)
    library = type(model).__module__
    mapping = None if task else {"base_model_class": name, "parent_library": library}
    return {"base_model_name_or_path": path, "task_type": task, "auto_mapping": mapping}


@torch.no_grad()
def _product(site: Site) -> Product:
    product = site.method.product(site.factors)
    assert product is not None, "checked before"
    return product


def _check(adapter: Adapter) -> None:
    if not adapter.sites:
        raise ValueError(f"{adapter} has no factors: there is nothing to export")
    if adapter.whole:
        raise ValueError(f"{next(iter(adapter.whole))} is trained whole: a LoRA file holds low-rank updates only")
    if changed := adapter.own.changed():
        raise ValueError(f"training changed {next(iter(changed))}: a LoRA file holds low-rank updates only")
    for name, site in adapter.sites.items():
        if not all(t.isfinite().all() for t in site.factors.tensors().values() if t.is_floating_point()):
            raise ValueError(f"{name} holds values that are not finite: the training has diverged")
        if site.method.product(site.factors) is None:
            raise ValueError(f"{site.method} at {name} has an update of full rank: no LoRA can hold it; merge instead")
        if len(site.owners) > 1:
            raise ValueError(f"{name} shares its weight with another layer: a LoRA file has no word for that")
        if site.part or not WRITTEN.fullmatch(site.kind.name):
            what = f"the part {site.part!r} of a weight" if site.part else f"of kind {site.kind.name!r}"
            raise ValueError(f"{name} is {what}: a LoRA file has no word for that; merge the adapter instead")
        if site.read_only:
            raise ValueError(f"the model reads {name} instead of calling it: a LoRA does nothing there; merge instead")
        if CONV.fullmatch(site.kind.name) and site.shape[0] > 1:
            raise ValueError(f"{name} is a convolution of {site.shape[0]} groups: a LoRA file has no word for that")
