"""SVF: train the singular values of a weight and nothing else.

    W' = W0 + U_r (diag(C) − Σ_r) V_rᵀ = U diag(C) Vᵀ        C = σ at the start

Y. Sun, Q. Chen, X. He, J. Wang, H. Feng, J. Han, E. Ding, J. Cheng, Z. Li, J. Wang. Singular Value Fine-tuning:
Few-shot Segmentation requires Few-parameters Fine-tuning. NeurIPS 2022, arXiv:2206.06122.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from svdpeft.methods.base import Decomposed, Given, Reference, Tensors, Unscaled
from svdpeft.registry import METHODS


@METHODS.register("svf")
@dataclass(frozen=True)
class SVF(Decomposed, Unscaled):
    """The singular values train under frozen singular vectors: min(m, n) values per weight.

    SVFT's plain pattern and SVDiff without its ReLU are the same function of W0, trained from another origin: here
    it is σ itself that trains, so weight decay pulls the weight towards zero, and there towards W0.

    When to use:
        Very few examples, as in few-shot segmentation, where more parameters would be learnt by heart; or to see how
        far rescaling alone goes. It takes large learning rates. U and V are stored beside the weight, twice the size
        of a square one, and no direction is ever mixed with another: where the task needs new directions,
        SVFT's other patterns or LoRA-XS reach further.

    Paper and code:
        The published code does the same for convolutions, as three layers in a row in the place of each; its path for
        linear layers is reported to leave U, Σ and V at random values, which is not offered.

    Args:
        rank: number of leading singular values that train, or a mapping from site pattern to it; ``None`` is all,
            as published.
        driver: of the decomposition; at full rank always exact.

    Example:
        >>> SVF(rank=None).at("layer", 6, 9).count(1, 6, 9)
        6
    """

    rank: int | dict[str, int] | None = None

    learning_rates: ClassVar = {"vision": 3e-2, "language": 2e-2}
    trains: ClassVar = ("C",)
    latex: ClassVar[str] = r"W' = W_0 + U\,(\mathrm{diag}(\sigma') - \Sigma)\,V^\top,\quad \sigma'_0 = \sigma"
    reference: ClassVar = Reference(
        key="sun2022svf",
        authors="Sun, Yanpeng and Chen, Qiang and He, Xiangyu and Wang, Jian and Feng, Haocheng and Han, Junyu and "
        "Ding, Errui and Cheng, Jian and Li, Zechao and Wang, Jingdong",
        title="Singular Value Fine-tuning: Few-shot Segmentation requires Few-parameters Fine-tuning",
        year=2022,
        venue="Advances in Neural Information Processing Systems",
        arxiv="2206.06122",
    )

    def start(self, w: Tensor, given: Given) -> Tensors:
        u, s, vh = self.svd(w, given)
        return {"L": u, "C": s, "A": vh}

    def replaces_weight(self, m: int, n: int) -> bool:
        return self._rank == min(m, n)
