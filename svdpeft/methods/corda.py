"""CorDA: the weight decomposed under the covariance of its inputs, so that what the data uses most comes first.

    W' = W0 + s(L A − L₀A₀)        W0 C = U Σ Vᵀ    C = Σ x xᵀ / N + λI    L₀ = U_r √Σ_r    A₀ = √Σ_r V_rᵀ C⁻¹

``mode="ipm"`` takes the leading triplets, ``"kpm"`` the trailing ones of the min(m, n).

Y. Yang, X. Li, Z. Zhou, S. L. Song, J. Wu, L. Nie, B. Ghanem. CorDA: Context-Oriented Decomposition Adaptation of
Large Language Models for Task-Aware Parameter-Efficient Fine-tuning. NeurIPS 2024, arXiv:2406.05223.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdpeft.decomposition import SVD, minor_svd
from svdpeft.methods.base import Decomposed, Given, Reference, Scaled, Tensors
from svdpeft.registry import METHODS


@METHODS.register("corda")
@dataclass(frozen=True)
class CorDA(Decomposed, Scaled):
    """PiSSA in the metric of the layer's own inputs, from a calibration pass.

    When to use:
        With "ipm" where data of the new task is at hand and speed of convergence counts; with "kpm" and data of what is
        to be kept, where forgetting counts. Needs ``svdpeft.calibrate`` over some hundred samples, n² numbers per site
        meanwhile, and a solve and an SVD per site; afterwards it costs what PiSSA costs. Not for weights that are read
        and never called.

    Paper and code:
        The paper's C is a sum over all tokens; here it is their mean, so that the balance of L and A does not depend on
        how many there were. L A is the same.
        The code (and PEFT) divides each batch's inputs by their largest entry, which weighs batches: not offered.
        The code doubles λ until a float32 inverse is good; in float64, as here, the first always is.
        PEFT divides Σ by the scale s, another balance of the same start: not offered, alpha = rank is the same.

    Args:
        alpha: α; ``None`` is α = r, the paper's choice.
        driver: of the decomposition; "kpm" is always exact.
        mode: "ipm" (instruction-previewed) adapts what the data uses most, "kpm" (knowledge-preserved) what it uses
            least.
        damp: λ as a share of the mean of C's diagonal.

    Example:
        >>> model, data = nn.Sequential(nn.Linear(6, 4)), [torch.randn(20, 6)]
        >>> adapter = svdpeft.attach(model, CorDA(rank=2), calibration=svdpeft.calibrate(model, data))
        >>> adapter.trainable_count
        20
    """

    mode: Literal["ipm", "kpm"] = "ipm"
    damp: float = 0.01

    learning_rates: ClassVar = {"vision": 3e-3, "language": 2e-4}
    needs: ClassVar = "inputs"
    latex: ClassVar[str] = (
        r"W' = W_0 + s\,(L A - L_0 A_0),\quad W_0 C = U \Sigma V^\top,\quad L_0 = U_r \sqrt{\Sigma_r},\quad "
        r"A_0 = \sqrt{\Sigma_r}\, V_r^\top C^{-1}"
    )
    reference: ClassVar = Reference(
        key="yang2024corda",
        authors="Yang, Yibo and Li, Xiaojie and Zhou, Zhongzhu and Song, Shuaiwen Leon and Wu, Jianlong and Nie, "
        "Liqiang and Ghanem, Bernard",
        title="CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware "
        "Parameter-Efficient Fine-tuning",
        year=2024,
        venue="Advances in Neural Information Processing Systems",
        arxiv="2406.05223",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("ipm", "kpm"):
            raise ValueError(f"mode {self.mode!r} is neither 'ipm' nor 'kpm'")
        if self.damp <= 0:
            raise ValueError(f"damp {self.damp} is not positive: without it C may have no inverse")

    def start(self, w: Tensor, given: Given) -> Tensors:
        c = given.seen("second", "CorDA").to(w.device, torch.float64)  # (*b, n, n)
        mean = c.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        # Scaled to a mean diagonal of one: no overflow, and the balance of L and A is put right at the end.
        mean = torch.where(mean > 0, mean, torch.ones_like(mean))  # inputs that were always zero
        c = c / mean + self.damp * torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
        wc = w.double() @ c
        u, s, vh = self.svd(wc, given) if self.mode == "ipm" else minor_svd(wc, self._rank, where=given.name)
        left, right = SVD(u, s, torch.linalg.solve(c, vh.mT).mT).balanced()  # C is symmetric
        assert given.statistics is not None
        balance = (mean / given.statistics.count).sqrt()
        return {"L": (left * balance).to(w), "A": (right / balance).to(w)}
