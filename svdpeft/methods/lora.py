"""LoRA: a random low-rank update that starts at zero.

    W' = W0 + s L A        L = 0    A ~ U(−1/√n, 1/√n)    s = α/r, or α/√r (rsLoRA)

E. J. Hu, Y. Shen, P. Wallis, Z. Allen-Zhu, Y. Li, S. Wang, L. Wang, W. Chen. LoRA: Low-Rank Adaptation of Large
Language Models. ICLR 2022, arXiv:2106.09685. The scale α/√r: D. Kalajdzievski, arXiv:2312.03732.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdpeft.methods.base import Given, Reference, Tensors, Triplets, generator
from svdpeft.methods.base.drawn import kaiming
from svdpeft.registry import METHODS


@METHODS.register("lora")
@dataclass(frozen=True)
class LoRA(Triplets):
    """The baseline of the family: needs nothing from the weight but its shape.

    When to use:
        As the baseline of every comparison, and wherever adapters must be served by other software: its file is what
        that software knows. Cheap to attach. L starts at zero, so early steps move A hardly at all; the SVD starts
        exist to change that. With large ranks use ``rs=True``, or the update shrinks as the rank grows.

    Paper and code:
        The paper draws A from a normal distribution and gives no variance; its code draws from U(−1/√n, 1/√n), which
        is the default here. ``init="gaussian"`` has standard deviation 1/r, as in PEFT.

    Args:
        init: of A: ``"uniform"`` or ``"gaussian"``.

    Example:
        >>> LoRA(rank=16, alpha=32).scale, LoRA(rank=16, rs=True).scale
        (2.0, 4.0)
    """

    init: Literal["uniform", "gaussian"] = "uniform"

    anchored: ClassVar[bool] = False
    pruned: ClassVar[tuple[str, ...]] = ("L",)  # its A has no start to return to
    draws: ClassVar = True
    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    latex: ClassVar[str] = r"W' = W_0 + s\,L A,\qquad L_0 = 0,\quad A_0 \sim U(-1/\sqrt{n},\, 1/\sqrt{n})"
    reference: ClassVar = Reference(
        key="hu2022lora",
        authors="Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and "
        "Wang, Shean and Wang, Lu and Chen, Weizhu",
        title="LoRA: Low-Rank Adaptation of Large Language Models",
        year=2022,
        venue="International Conference on Learning Representations",
        arxiv="2106.09685",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in ("uniform", "gaussian"):
            raise ValueError(f"init {self.init!r} is neither 'uniform' nor 'gaussian'")

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        shape, source = (*batch, self._rank, n), generator(given.seed)
        if self.init == "gaussian":
            a = torch.randn(shape, generator=source, dtype=torch.float64) / self._rank
        else:
            a = kaiming(*shape, source=source)
        return {"L": w.new_zeros(*batch, m, self._rank), "A": a.to(w)}
