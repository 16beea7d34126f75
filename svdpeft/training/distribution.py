"""A training whose model accelerate shards over processes, by FSDP2 or DeepSpeed: what it needs, and what it cannot."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.roster import adapters_in

ASKED_FOR = "ACCELERATE_USE_FSDP"  # by accelerate's launcher, from its configuration


def prepare(accelerator: Any, adapter: Adapter, corrects: bool = False) -> None:
    """Make ready for the sharding that the accelerator will do, or refuse it while nothing has changed.

    Args:
        accelerator: of the trainer.
        adapter: that is to be trained.
        corrects: whether a rule for gradients is asked for.

    Raises:
        ValueError: FSDP that was asked for and is not used; FSDP1; weights that are in one process alone; trained
            tensors that sites share, with FSDP; a method that acts on gradients or keeps a state, or a rule for
            gradients, with DeepSpeed.
    """
    if (plugin := getattr(accelerator.state, "fsdp_plugin", None)) is not None:
        _prepare_fsdp(plugin, accelerator.device, adapter)
    elif os.environ.get(ASKED_FOR, "").lower() == "true":
        raise ValueError(
            f"FSDP was asked for ({ASKED_FOR}=true), and accelerate trains without it on {accelerator.device.type} "
            f"({accelerator.state.distributed_type}): it takes FSDP up on accelerators alone. Launch with a "
            "configuration for whole copies of the model (DDP), such as examples/launch/ddp.yaml"
        )
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        _check_deepspeed(adapter, corrects)


def _prepare_fsdp(plugin: Any, device: torch.device, adapter: Adapter) -> None:
    if plugin.fsdp_version != 2:
        raise ValueError(
            "FSDP1 makes one flat parameter of all that a block has, frozen or not, and factors are no matrices any "
            "more: set fsdp_version: 2"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading leaves all processes but one without weights, and then takes the rest of "
            "the model apart on the meta device: set it to false"
        )
    tied: dict[int, nn.Parameter] = {}
    for other in adapters_in(adapter.model):
        for name, site in other.sites.items():
            for role, parameter in site.factors.named_parameters():
                if role not in site.factors.tied:
                    continue
                if parameter.requires_grad:
                    raise ValueError(
                        f"{site.method} trains {role} of {name} for several sites at once, and FSDP2 has no parameter "
                        "in two of its groups: train with several whole copies of the model (DDP)"
                    )
                tied[id(parameter)] = parameter
    if not tied:
        return
    if isinstance(plugin.ignored_modules, str):
        raise ValueError(
            f"ignored_modules {plugin.ignored_modules!r} of FSDP is a pattern, and tensors that sites share have to be "
            "left out as well, which have no module of their own: name the modules themselves"
        )
    # Frozen and small beside the base: each process keeps them whole, and FSDP does not move what it leaves out.
    for parameter in tied.values():
        parameter.data = parameter.data.to(device)
    plugin.ignored_modules = [*(plugin.ignored_modules or ()), nn.ParameterList(tied.values())]


def _check_deepspeed(adapter: Adapter, corrects: bool) -> None:
    if corrects:
        raise ValueError(
            "a rule for gradients (gradients=…) corrects them before the step, and DeepSpeed takes its step within "
            "backward and does not give them away: train with DDP or FSDP2"
        )
    for method in (site.method for site in adapter.sites.values()):
        if method.changes_gradients or method.keeps_state:
            raise ValueError(
                f"{method} acts on gradients, or keeps something from step to step, and DeepSpeed takes its step "
                "within backward and gives neither away: train with DDP or FSDP2"
            )
