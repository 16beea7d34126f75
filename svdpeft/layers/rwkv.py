"""RWKV: the raw matrices of a time-mix, and the roles of all its weights in every spelling in use.

    RWKV-6   tanh(x @ time_maa_w1) @ time_maa_w2, tanh(x @ time_decay_w1) @ time_decay_w2       stored (in, out);
             time_maa_w2 is five matrices, (5, in, out)
    RWKV-7   tanh(x @ w1) @ w2, (x @ a1) @ a2, (x @ v1) @ v2, sigmoid(x @ g1) @ g2              stored (in, out)

Their other spelling, low-rank modules of two linear layers (``w_lora.lora.0``), needs no kind, only the roles.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from svdpeft.layers.base import Example, LayerKind, dotted
from svdpeft.registry import KINDS

# Role -> the names that it has below a time-mix (BlinkDL's, transformers', flash-linear-attention's).
TIME_MIX = {
    "receptance": r"receptance|r_proj(\.linear)?",
    "key": r"key|k_proj(\.linear)?",
    "value": r"value|v_proj(\.linear)?",
    "gate": r"gate|g_proj(\.linear)?|g1|g2|gate_w1|gate_w2|g_lora\.lora\.[02]",
    "output": r"output|o_proj",
    "decay": r"w1|w2|time_decay_w1|time_decay_w2|w_lora\.lora\.[02]|w_proj\.linear\.lora\.[02]",
    "rate": r"a1|a2|time_aaa_w1|time_aaa_w2|a_lora\.lora\.[02]",
    "value-residual": r"v1|v2|mv_w1|mv_w2|v_lora\.lora\.[02]",
    "shift": r"time_maa_w1|time_maa_w2|time_maa_rkvw_w1|time_maa_rkvw_w2|x_proj\.0\.linear|x_proj\.2",
}
CHANNEL_MIX = {"receptance": r"receptance", "key": r"key", "value": r"value"}
RAW = re.compile(r"[wavg][12]|(time_(maa|decay|aaa|maa_rkvw)|gate|mv)_w[12]")
RESCALES = "transformers.models.rwkv.modeling_rwkv.RwkvModel"
# What only a time-mix has: its receptance, and one of the vectors that mix a token with the one before.
MIXING = re.compile(r"time_mix_(r|receptance)|time_maa_(r|x)|x_r|x_bias")
MIXING_CHANNELS = re.compile(r"time_mix_(k|key)|time_maa_k|x_k")


@KINDS.register("rwkv")
class RWKV(LayerKind):
    """A matrix used as ``x @ w``: stored (…, in, out)."""

    linear: bool = True

    @classmethod
    def match(cls, module: nn.Module, parameter: str) -> int | None:
        matrix = RAW.fullmatch(parameter) and module._parameters[parameter].ndim in (2, 3)  # type: ignore[union-attr]
        return 0 if matrix and _is_time_mix(module) else None

    @classmethod
    def roles(cls, model: nn.Module) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for block, module in model.named_modules():
            if _is_time_mix(module):
                table, group = TIME_MIX, "time-mix"
            elif _is_channel_mix(module):
                table, group = CHANNEL_MIX, "channel-mix"
            else:
                continue
            below = [name for name, _ in module.named_modules()] + list(module._parameters)
            for role, pattern in table.items():
                for name in below:
                    if re.fullmatch(pattern, name):
                        full = f"{block}.{name}".lstrip(".")
                        found[full] = ("rwkv", f"rwkv-{group}", f"{group}.{role}")
        return found

    @classmethod
    def objection(cls, model: nn.Module) -> str | None:
        for module in model.modules():
            config = getattr(module, "config", None)
            every = getattr(config, "rescale_every", 0)
            if dotted(type(module)) == RESCALES and 0 < every < getattr(config, "num_hidden_layers", 0):
                return (
                    f"rescale_every={every}: the model divides and multiplies weights in place whenever it changes "
                    "between training and evaluation, and an update beside them would not follow; set "
                    "model.config.rescale_every = 0 before its first forward"
                )
        return None

    def to_matrix(self, module: nn.Module, w: Tensor) -> Tensor:
        return w.mT

    def from_matrix(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.mT

    def examples(self) -> list[Example]:
        x = torch.randn(2, 3, 6, dtype=torch.float64)
        return [Example(TimeMix(6), x, ("w1", "w2", "time_maa_w1", "time_maa_w2", "receptance"))]


def _is_time_mix(module: nn.Module) -> bool:
    receptance = "receptance" in module._modules or "r_proj" in module._modules
    return receptance and any(MIXING.fullmatch(name) for name in module._parameters) and not _is_channel_mix(module)


def _is_channel_mix(module: nn.Module) -> bool:
    children = {name for name, child in module._modules.items() if child is not None}
    mixes = {"key", "value"} <= children <= {"key", "value", "receptance", "time_shift"}
    return mixes and any(MIXING_CHANNELS.fullmatch(name) for name in module._parameters)


class TimeMix(nn.Module):
    """The data-dependent parts of RWKV-6 and RWKV-7 without the recurrence: an example."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def matrix(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, dtype=torch.float64) / width)

        self.x_r = matrix(width)
        self.w1, self.w2 = matrix(width, 4), matrix(4, width)
        self.time_maa_w1, self.time_maa_w2 = matrix(width, 5 * 3), matrix(5, 3, width)
        self.receptance = nn.Linear(width, width + 1, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        shift = torch.tanh(x @ self.time_maa_w1).unflatten(-1, (5, 3)).movedim(-2, 0)  # (5, *, 3)
        mixed = x + (shift.flatten(1, -2) @ self.time_maa_w2).sum(0).view(x.shape) * self.x_r
        return self.receptance(mixed + torch.tanh(mixed @ self.w1) @ self.w2)
