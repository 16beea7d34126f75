"""BitFit: train the biases of the base and nothing else.

    W' = W0        b' = b0 + Δb        for every bias of the model

E. Ben Zaken, Y. Goldberg, S. Ravfogel. BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models. ACL 2022, arXiv:2106.10199.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from svdpeft.methods.base import Method, Reference
from svdpeft.registry import METHODS

BIAS = re.compile(r"(.*[._])?bias(_[qkv])?")  # bias, in_proj_bias, q_bias, bias_k; and no relative_position_bias_table


@METHODS.register("bitfit")
@dataclass(frozen=True)
class BitFit(Method):
    """Every bias vector trains, those of normalisation layers included.

    When to use:
        As the cheapest honest baseline: about 0.1 % of a transformer, no factors, no cost at inference. It does nothing
        for models without biases (Llama, Mistral, Gemma), where it is refused, and cannot change what a layer mixes.

    Example:
        >>> BitFit().whole(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)))
        ('0.bias', '1.bias')
    """

    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    factored: ClassVar[bool] = False
    latex: ClassVar[str] = r"W' = W_0,\qquad b' = b_0 + \Delta b"
    reference: ClassVar = Reference(
        key="benzaken2022bitfit",
        authors="Ben Zaken, Elad and Goldberg, Yoav and Ravfogel, Shauli",
        title="BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
        year=2022,
        venue="Annual Meeting of the Association for Computational Linguistics",
        arxiv="2106.10199",
    )

    def whole(self, model: nn.Module) -> tuple[str, ...]:
        names = [n for n, p in model.named_parameters() if p.ndim == 1 and BIAS.fullmatch(n.rpartition(".")[2])]
        found = tuple(n for n in names if ".svdpeft." not in f".{n}")
        if not found:
            raise ValueError(f"BitFit trains the biases of a model, and {type(model).__name__} has none")
        return found
