"""OSF: train the trailing singular triplets, with gradients kept orthogonal to the leading ones.

    W' = W0 + L diag(C) A − L₀ diag(C₀) A₀        L₀ = U_low    C₀ = σ_low    A₀ = V_lowᵀ
    before each step:  ∂L ← (I − U_high U_highᵀ) ∂L        ∂A ← ∂A (I − V_high V_highᵀ)

The rank is that of the trained tail; the other min(m, n) − r triplets are the high ones (PEFT's effective rank).

N. S. Nayak, K. Killamsetty, L. Han, A. Bhandwaldar, P. Chanda, K. Xu, H. Wang, A. Pareja, O. Silkin, M. Eyceoz,
A. Srivastava. Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning. ICLR 2026,
arXiv:2504.07097.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdpeft.decomposition import truncated_svd
from svdpeft.methods.base import Factors, Given, Progress, Reference, Tensors, Unscaled, by_shape
from svdpeft.registry import METHODS

PROJECTS = ("gradient", "factors")


@METHODS.register("osf")
@dataclass(frozen=True)
class OSF(Unscaled):
    """Nearly a full fine-tune that stays out of the weight's leading singular directions.

    When to use:
        For one task after another on one model, where forgetting costs more than memory: at the default rank it
        trains as many values as the weight has, and keeps as many start values beside them. Adam rescales the
        projected gradient entry by entry, and weight decay knows no subspace, so with ``project="gradient"`` some
        of each step still leaks into the leading directions; plain SGD leaks nothing.

    Paper and code:
        The paper sets the rank of each layer from the similarity of its inputs and outputs; Hugging Face PEFT takes
        one share for all, half of min(m, n), and so does this. A mapping of ranks gives each site its own.
        PEFT projects while gradients are computed, this does between clipping and the step: a clipped norm counts
        the removed part.
        The paper speaks of strictly orthogonal updates; its code projects gradients alone. ``project="factors"`` is
        ours: it projects the factors after each step instead, whatever the optimizer did.

    Args:
        rank: r, the number of trained trailing triplets, or a mapping from site pattern to r; ``None`` is
            min(m, n) − ⌊min(m, n)/2⌋.
        project: what is kept orthogonal to the leading triplets: the ``"gradient"`` before the optimizer's step, or
            the ``"factors"`` after it.
    """

    rank: int | dict[str, int] | None = None
    project: Literal["gradient", "factors"] = "gradient"

    learning_rates: ClassVar = {"vision": 3e-3, "language": 2e-4}
    trains: ClassVar = ("L", "C", "A")
    latex: ClassVar[str] = (
        r"W' = W_0 + L\,\mathrm{diag}(C)\,A - L_0\,\mathrm{diag}(C_0)\,A_0,\quad "
        r"\nabla_L \leftarrow (I - U_h U_h^\top)\nabla_L,\; \nabla_A \leftarrow \nabla_A (I - V_h V_h^\top)"
    )
    reference: ClassVar = Reference(
        key="nayak2026sculpting",
        authors="Nayak, Nikhil Shivakumar and Killamsetty, Krishnateja and Han, Ligong and Bhandwaldar, Abhishek and "
        "Chanda, Prateek and Xu, Kai and Wang, Hao and Pareja, Aldo and Silkin, Oleg and Eyceoz, Mustafa and "
        "Srivastava, Akash",
        title="Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning",
        year=2026,
        venue="International Conference on Learning Representations",
        arxiv="2504.07097",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.project not in PROJECTS:
            raise ValueError(f"project {self.project!r} is not one of {', '.join(PROJECTS)}")

    def default_rank(self, m: int, n: int) -> int:
        return min(m, n) - min(m, n) // 2

    def start(self, w: Tensor, given: Given) -> Tensors:
        *_, m, n = w.shape
        u, s, vh = truncated_svd(w, None, "exact", where=given.name)
        high = min(m, n) - self._rank
        tensors = {"L": u[..., high:].contiguous(), "C": s[..., high:].clone(), "A": vh[..., high:, :].clone()}
        # A square basis needs no copy of its leading part: I − U_high U_highᵀ = L₀L₀ᵀ.
        if high and m > n:
            tensors["U"] = u[..., :high].contiguous()
        if high and n > m:
            tensors["V"] = vh[..., :high, :].clone()
        return tensors

    @property
    def changes_gradients(self) -> bool:
        return self.project == "gradient"

    @torch.no_grad()
    def before_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        if self.project == "gradient":
            _project(sites, lambda p: p.grad)

    @torch.no_grad()
    def after_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        if self.project == "factors":
            _project(sites, lambda p: p)


def _project(sites: Sequence[Factors], of: Callable[[Tensor], Tensor | None]) -> None:
    """Take the leading directions out of what ``of`` gives of L and Aᵀ, one batched call per shape."""
    for inside in (False, True):  # X − U_high(U_highᵀX), or L₀(L₀ᵀX) where that is the same
        found = [pair for f in sites for pair in _pairs(f, of, inside)]
        for same in by_shape([x for x, _ in found]):
            for group in ([same[i] for i in g] for g in by_shape([found[i][1] for i in same])):
                x, q = (torch.stack([found[i][side] for i in group]) for side in (0, 1))
                part = q @ (q.mT @ x)
                torch._foreach_copy_([found[i][0] for i in group], list((part if inside else x - part).unbind()))


def _pairs(f: Factors, of: Callable[[Tensor], Tensor | None], inside: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """What is projected at one site, and the basis, both with their vectors as columns, as views."""
    rank, k = f.C.shape[-1], min(f.L.shape[-2], f.A.shape[-1])
    for name, high, turn in (("L", "U", False), ("A", "V", True)):
        stored = high in f._parameters
        x, basis = of(getattr(f, name)), getattr(f, high if stored else f"{name}0")
        if rank < k and stored != inside and x is not None:  # None: the loss did not reach this site
            yield (x.mT, basis.mT) if turn else (x, basis)
