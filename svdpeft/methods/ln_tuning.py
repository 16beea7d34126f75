"""LayerNorm tuning: train the scale and shift of the normalisation layers and nothing else.

    W' = W0        g' = g0 + Δg,  b' = b0 + Δb        for every normalisation y = g ∘ norm(x) + b

B. Zhao, H. Tu, C. Wei, J. Mei, C. Xie. Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning.
ICLR 2024, arXiv:2312.11420.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from svdpeft.methods.base import Method, Reference
from svdpeft.registry import METHODS


@METHODS.register("ln-tuning")
@dataclass(frozen=True)
class LNTuning(Method):
    """Every vector of a layer whose class is a normalisation: LayerNorm, RMSNorm, GroupNorm, BatchNorm and theirs.

    When to use:
        As a baseline of well below 0.1 % of a transformer that, unlike BitFit, also works where layers have no biases.
        It rescales features and cannot mix them, so expect it to fall behind on tasks far from pretraining.

    Paper and code:
        The paper tunes the LayerNorms of a multi-modal language model beside its vision connector; name the connector
        with ``train=``. A CNN has BatchNorm instead of LayerNorm: its affine parameters train here too.

    Example:
        >>> LNTuning().whole(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)))
        ('1.weight', '1.bias')
    """

    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    factored: ClassVar[bool] = False
    latex: ClassVar[str] = r"W' = W_0,\qquad g' = g_0 + \Delta g,\quad b' = b_0 + \Delta b"
    example: ClassVar[str] = """\
from torch import nn
import svdpeft

model = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 320), nn.GELU(), nn.Linear(320, 10))
adapter = svdpeft.attach(model, svdpeft.LNTuning(), train=["3"])
print(adapter.summary())
"""
    reference: ClassVar = Reference(
        key="zhao2024tuning",
        authors="Zhao, Bingchen and Tu, Haoqin and Wei, Chen and Mei, Jieru and Xie, Cihang",
        title="Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
        year=2024,
        venue="International Conference on Learning Representations",
        arxiv="2312.11420",
    )

    def whole(self, model: nn.Module) -> tuple[str, ...]:
        found = tuple(
            f"{layer}.{name}".lstrip(".")
            for layer, module in model.named_modules()
            if any("norm" in cls.__name__.lower() for cls in type(module).__mro__)
            for name, p in module.named_parameters(recurse=False)
            if p.ndim == 1
        )
        if not found:
            raise ValueError(
                f"LNTuning trains normalisation layers, and {type(model).__name__} has none with parameters"
            )
        return found
