"""DuDe: DoRA around PiSSA, magnitude apart from direction and the direction from its principal part.

    W' = diag(mag / ‖V‖) V        V = W0 + s(L A − L₀A₀)    L₀ = U_r √Σ_r    A₀ = √Σ_r V_rᵀ    mag = ‖W0‖ at the start

A name for ``DoRA(PiSSA(…))``, the same to the bit.

J. Han, X. Zhang, Y. Zhang. Dual Decomposition of Weights and Singular Value Low Rank Adaptation. arXiv:2505.14367.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from svdpeft.methods.base import Reference
from svdpeft.methods.dora import DoRA
from svdpeft.methods.pissa import PiSSA
from svdpeft.registry import METHODS


@METHODS.register("dude")
@dataclass(frozen=True)
class DuDe(DoRA):
    """DoRA whose direction starts at the weight's leading singular triplets.

    When to use:
        As DoRA, where PiSSA's start is wanted: what both cost, it costs. ``DuDe(PiSSA(rank=16))`` has another rank, and
        with another method inside it is DoRA around that.

    Paper and code:
        There was no official code to compare with. The paper writes a magnitude per input, as DoRA's text does; here
        there is one per output, as in DoRA's code: ``magnitude="columns"`` is the paper's letter.

    Args:
        inner: the method that changes the direction, PiSSA.

    Example:
        >>> print(DuDe())
        DuDe(PiSSA(rank=8))
    """

    inner: Any = PiSSA()  # noqa: RUF009 (frozen)

    learning_rates: ClassVar = {"vision": 3e-3, "language": 2e-4}
    latex: ClassVar[str] = (
        r"W' = \operatorname{diag}\!\left(\frac{m}{\lVert V\rVert}\right) V,\quad V = W_0 + s\,(L A - L_0 A_0),\quad "
        r"L_0 = U_r \sqrt{\Sigma_r},\quad A_0 = \sqrt{\Sigma_r}\, V_r^\top"
    )
    reference: ClassVar = Reference(
        key="han2025dude",
        authors="Han, Jialong and Zhang, Si and Zhang, Ke",
        title="Dual Decomposition of Weights and Singular Value Low Rank Adaptation",
        year=2025,
        arxiv="2505.14367",
    )
