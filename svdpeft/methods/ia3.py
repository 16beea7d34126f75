"""(IA)³: one learned factor per output of a layer, or per input.

    W' = diag(l) W0        l = 1        side="input": W' = W0 diag(l)

H. Liu, D. Tam, M. Muqeeth, J. Mohta, T. Huang, M. Bansal, C. Raffel.
Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning.
NeurIPS 2022, arXiv:2205.05638.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from svdpeft.decomposition import check_matrix
from svdpeft.methods.base import Call, Factors, Given, Reference, Tensors, Transform
from svdpeft.registry import METHODS


@METHODS.register("ia3")
@dataclass(frozen=True)
class IA3(Transform):
    """Rows of the weight, or its columns, are made longer or shorter; their directions stay.

    When to use:
        Where an adapter must be tiny: m values, or n, per layer, and next to nothing per forward. The paper scales keys
        and values at their output and the second feed-forward matrix at its input:
        ``attach(model, targets={"k_proj": IA3(), "v_proj": IA3(), "down_proj": IA3(side="input")})``. It cannot turn a
        direction into another one, and no LoRA file can hold the result.

    Paper and code:
        The paper scales a layer's output with its bias. Here, as with every method, the bias is the base's own and is
            not scaled: the two are alike on layers without one, such as those of T5 and Llama, and ``train=`` takes
            the bias where there is one.
        On a convolution PEFT has one factor per input channel for ``side="input"``; here one per input channel and
            position of the kernel, a column of the weight's matrix.
        PEFT divides by l + 1e-8 to undo a merge; here the base's own bits come back.

    Args:
        side: what has a factor each: ``"output"`` or ``"input"``.

    Example:
        >>> IA3().count(1, 1024, 4096), IA3(side="input").count(1, 1024, 4096)
        (1024, 4096)
    """

    side: Literal["output", "input"] = "output"

    trains: ClassVar = ("l",)
    knob: ClassVar[str] = "side"
    learning_rates: ClassVar = {"vision": 1e-2, "language": 3e-3}
    latex: ClassVar[str] = r"W' = \operatorname{diag}(l)\, W_0 \quad\mathrm{or}\quad W_0 \operatorname{diag}(l)"
    reference: ClassVar = Reference(
        key="liu2022ia3",
        authors="Liu, Haokun and Tam, Derek and Muqeeth, Mohammed and Mohta, Jay and Huang, Tenghao and "
        "Bansal, Mohit and Raffel, Colin",
        title="Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
        year=2022,
        venue="Advances in Neural Information Processing Systems",
        arxiv="2205.05638",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side not in ("output", "input"):
            raise ValueError(f"side {self.side!r} is neither 'output' nor 'input'")

    def start(self, w: Tensor, given: Given) -> Tensors:
        check_matrix(w, given.name)  # of zeros a factor makes zeros
        *batch, m, n = w.shape
        return {"l": w.new_ones(*batch, m if self.side == "output" else n)}

    def count(self, batch: int, m: int, n: int) -> int:
        """m per matrix, or n on the side of the input."""
        return batch * (m if self.side == "output" else n)

    def knob_values(self, sites: object) -> list[str]:
        return [self.side]  # the count is what the layers' sizes make it

    def delta(self, f: Factors, w0: Tensor) -> Tensor:
        return w0 * self._beside(f.l.to(w0.dtype) - 1)

    def absolute(self, f: Factors, w0: Tensor) -> Tensor:
        return w0.abs() * self._beside(f.l.abs() + 1)

    def acts(self, linear: bool) -> bool:
        return True

    def act(self, f: Factors, call: Call) -> Tensor:
        return call.rows(f.l - 1) if self.side == "output" else call.columns(f.l - 1)

    def _beside(self, values: Tensor) -> Tensor:
        return values.unsqueeze(-1 if self.side == "output" else -2)
