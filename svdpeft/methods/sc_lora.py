"""SC-LoRA: LoRA started in the outputs that the task uses and that data to be kept do not.

    W' = W0 + s(L A − L₀A₀)        (1 − β) E₊[y yᵀ] − β E₋[y yᵀ] = Q Λ Qᵀ, y = W0 x    L₀ = Q_r    A₀ = Q_rᵀ W0

E₊ is the mean over data of the task, E₋ over data whose outputs are to stay, Q_r are the eigenvectors of the r largest
eigenvalues, s = α/r. W0 E[x xᵀ] W0ᵀ is E[y yᵀ], so the inputs of a layer are enough.

M. Luo, F. Kuang, Y. Wang, Z. Liu, T. He. SC-LoRA: Balancing Efficient Fine-tuning and Knowledge Preservation via
Subspace-Constrained LoRA. arXiv:2505.23724.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.decomposition import canonical_signs
from svdpeft.methods.base import Given, Reference, Scaled, Tensors
from svdpeft.registry import METHODS


@METHODS.register("sc-lora")
@dataclass(frozen=True)
class SCLoRA(Scaled):
    """A split of the weight by two sets of data: what one uses and the other does not.

    When to use:
        Where data of the task and data of what the model must still do are both at hand: β trades the one for the
        other. ``svdpeft.calibrate(model, task).preserving(svdpeft.calibrate(model, kept))`` is one pass over each, and
        there is an eigendecomposition per weight; ``svdpeft train`` does all of it with ``--preserve PATH``. With β = 0
        the second set is not asked for; that is Astra's head. Not for weights that are read and never called.

    Paper and code:
        There was no official code to compare with. The moments are means over positions and not centred, the start is
        subtracted under any scale s, and the learning rates are PiSSA's: ours.

    Args:
        alpha: α of s = α/r; ``None`` is α = r.
        beta: β in [0, 1], the weight of what is to stay.

    Example:
        >>> model, task, kept = nn.Sequential(nn.Linear(6, 4)), [torch.randn(20, 6)], [torch.randn(20, 6)]
        >>> seen = svdpeft.calibrate(model, task).preserving(svdpeft.calibrate(model, kept))
        >>> svdpeft.attach(model, SCLoRA(rank=2), calibration=seen).trainable_count
        20
    """

    beta: float = 0.5

    needs: ClassVar = "inputs"
    learning_rates: ClassVar = {"vision": 3e-3, "language": 2e-4}
    latex: ClassVar[str] = (
        r"W' = W_0 + s\,(L A - L_0 A_0),\quad W_0\left((1 - \beta)\,\mathbb{E}_+[x x^\top] - \beta\,\mathbb{E}_-"
        r"[x x^\top]\right)W_0^\top = Q \Lambda Q^\top,\quad L_0 = Q_r,\quad A_0 = Q_r^\top W_0"
    )
    example: ClassVar[str] = """\
import torch
from torch import nn
import svdpeft

model = nn.Sequential(nn.Linear(256, 320), nn.GELU(), nn.Linear(320, 10))
task, kept = torch.randn(2, 8, 16, 256)  # yours: a few batches of the data to adapt to, and of what is to stay
calibration = svdpeft.calibrate(model, task, targets=["0"])
calibration = calibration.preserving(svdpeft.calibrate(model, kept, targets=["0"]))
adapter = svdpeft.attach(model, svdpeft.SCLoRA(), targets=["0"], train=["2"], calibration=calibration)
print(adapter.summary())
"""
    reference: ClassVar = Reference(
        key="luo2025sclora",
        authors="Luo, Minrui and Kuang, Fuhang and Wang, Yu and Liu, Zirui and He, Tianxing",
        title="SC-LoRA: Balancing Efficient Fine-tuning and Knowledge Preservation via Subspace-Constrained LoRA",
        year=2025,
        arxiv="2505.23724",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta {self.beta} is outside [0, 1]")

    @property
    def preserves(self) -> bool:
        return self.beta > 0

    def start(self, w: Tensor, given: Given) -> Tensors:
        second = given.seen("second", "SCLoRA").to(w.device, torch.float64)
        count = given.statistics.count if given.statistics else 0
        if self._rank > count:
            raise ValueError(
                f"SCLoRA of rank {self._rank} starts from directions of the outputs of {given.name}, of which {count} "
                f"inputs show no more: calibrate with more, or take a rank of at most {max(count, 1)} there"
            )
        balance = (1 - self.beta) / count * second
        if self.preserves:
            balance = balance - self.beta * given.seen("kept", str(self)).to(balance)
        # Within what the weight can give out: beyond it all outputs are zero, which is no direction.
        reach, seen = torch.linalg.qr(w.double())  # (*b, m, k), (*b, k, n)
        q = reach @ torch.linalg.eigh(seen @ balance @ seen.mT).eigenvectors[..., -self._rank :].flip(-1)
        left, right = canonical_signs(q, q.mT @ w.double())
        return {"L": left.to(w), "A": right.to(w)}
