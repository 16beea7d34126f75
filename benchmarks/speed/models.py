"""The models that are timed, and what of PEFT and of the papers stands beside us."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import svdpeft

PEFT_STARTS = {"peft LoRA": True, "peft PiSSA": "pissa", "peft PiSSA, 4 iterations": "pissa_niter_4"}
PEFT_STARTS["peft PiSSA, 16 iterations"] = "pissa_niter_16"


@dataclass(frozen=True)
class Bench:
    """A model and how it is called.

    Args:
        name: a model of ``svdpeft.models.load``, or the shape of Llama-2-7B with this many layers, ``"7b:2"``.
        device: such as ``"cuda"``.
        dtype: of the base; factors are in float32.
        rank: of every adapter.
        batch: rows of a step.
        tokens: of a row.
    """

    name: str
    device: str
    dtype: torch.dtype
    rank: int
    batch: int
    tokens: int

    def base(self) -> nn.Module:
        """Return the model, in training mode and without gradients."""
        if self.name.startswith("7b"):
            model = _llama(int(self.name.partition(":")[2] or 32), self.dtype, self.device)
        elif self.name == "tiny":
            model = _llama(2, self.dtype, self.device, hidden_size=64, intermediate_size=176, num_attention_heads=4)
        else:
            model = svdpeft.models.load(self.name, dtype=self.dtype).model.to(self.device)
        return model.train().requires_grad_(False)

    def ids(self) -> Tensor:
        """Return drawn token ids, (batch, tokens)."""
        draws = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (self.batch, self.tokens), generator=draws).to(self.device)


def peft(model: nn.Module, name: str, rank: int) -> nn.Module:
    """Wrap all linear layers but the head by PEFT, in the start that a name of ``PEFT_STARTS`` says."""
    from peft import LoraConfig, get_peft_model

    start: Any = PEFT_STARTS[name]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=start)
    return get_peft_model(model, config)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that are adapted everywhere: all linear ones but the head."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")}


class MultipliedOut(nn.Module):
    """SVFT as its paper's code has it: x Vᵀᵀ, then a dense core, then Uᵀ; the weight itself is dropped."""

    def __init__(self, layer: nn.Linear, band: int) -> None:
        super().__init__()
        u, s, vh = (t.to(layer.weight.dtype) for t in svdpeft.decomposition.truncated_svd(layer.weight))
        for name, value in (("u", u), ("s", s), ("vh", vh)):
            self.register_buffer(name, value)
        index = svdpeft.decomposition.band_index(len(s), band)
        self.register_buffer("index", index.to(s.device))
        self.values = nn.Parameter(torch.zeros(len(index), device=s.device))

    def forward(self, x: Tensor) -> Tensor:
        core = svdpeft.decomposition.scatter_core(self.values.to(x.dtype), self.index, len(self.s))
        return x @ self.vh.mT @ (torch.diag(self.s) + core).mT @ self.u.mT


def multiplied_out(model: nn.Module, band: int) -> nn.Module:
    """Put ``MultipliedOut`` in the place of every linear layer but the head."""
    for name, layer in linears(model).items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, MultipliedOut(layer, band))
    return model


def copied(model: nn.Module) -> nn.Module:
    """A copy of a base, which an adapter may change."""
    return copy.deepcopy(model)


def _llama(layers: int, dtype: torch.dtype, device: str, **sizes: int) -> nn.Module:
    """Random weights in the shapes of Llama-2-7B, unless others are given."""
    import transformers

    config = transformers.LlamaConfig(num_hidden_layers=layers, **sizes)  # the rest is that of Llama-2-7B
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.LlamaForCausalLM._from_config(config, dtype=dtype)


def packaged_sorsa(model: nn.Module, rank: int) -> nn.Module:
    """Put the layers of SORSA's own package in the place of every linear layer but the head.

    Raises:
        ImportError: it is not installed (``pip install sorsa``).
    """
    from sorsa.layer import Linear

    for name, layer in linears(model).items():
        u, s, vh = svdpeft.decomposition.truncated_svd(layer.weight, rank)
        m, n = layer.weight.shape
        with torch.device(layer.weight.device):
            new = Linear(n, m, r=rank)
        new.weight.data = (layer.weight.float() - u * s @ vh).to(layer.weight.dtype)
        # In the weight's dtype, as its forward wants them
        for role, value in (("A", vh), ("S", s), ("B", u)):
            setattr(new, f"sorsa_{role}", nn.Parameter(value.to(layer.weight.dtype)))
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, new)
    return model
