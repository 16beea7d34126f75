"""HRA: reflect the inputs of the frozen weight at a few hyperplanes, one after the other.

    W' = W0 H        H = (I − 2 û_1 û_1ᵀ) … (I − 2 û_r û_rᵀ)        û = u / ‖u‖        u_2 = u_1, u_4 = u_3, … first

Two equal reflections undo each other, so that H = I at the start, and two that differ are a rotation of their plane.
With d = û_2 − û_1 a pair is I + û_1 (−2‖d‖² û_1 + (2 − 2‖d‖²) d)ᵀ − 2 d û_2ᵀ, which is I bit for bit where d = 0 and
keeps all its digits where d is small. The pairs are multiplied in the compact WY form, H = I + X T Yᵀ, where T⁻¹ is I
less what is above the blocks of the pairs in YᵀX. Nothing of size n×n is built: a layer is given the product of the
thin factors W0 X and T Yᵀ.

S. Yuan, H. Liu, H. Xu.
Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation.
NeurIPS 2024, arXiv:2405.17484.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.decomposition import Product, check_matrix
from svdpeft.methods.base import Factors, Given, Reference, Tensors, ThinTransform, generator
from svdpeft.patterns import chosen
from svdpeft.registry import METHODS


@METHODS.register("hra")
@dataclass(frozen=True)
class HRA(ThinTransform):
    """A rotation of the input by a chain of reflections: orthogonal like OFT, of rank r like LoRA.

    When to use:
        To keep the singular values of W0 and the angles between its rows, at r n values, and to serve the result as a
        LoRA of rank r: it is one. With γ > 0 the reflections are pushed towards orthogonal directions; γ → ∞ of the
        paper is another method.

    Paper and code:
        The paper and PEFT take an odd number of reflections too, which cannot start as the base model: refused here.
        PEFT builds H as an n×n matrix in every forward; here it is never built.
        The paper's λ = ∞, Gram-Schmidt on U, divides zero by zero at this start: not here.
        On convolutions PEFT takes kernels for square ones, and refuses groups; here each group has its own U.

    Args:
        rank: r, number of reflections, an even one of at most n, or a mapping from site pattern to r.
        gamma: γ, weight of the penalty γ Σ ‖ÛᵀÛ − I‖_F over all sites; the paper's is 1e-5 on GLUE and 1e-4 on
            language models.

    Example:
        >>> HRA(rank=8).count(1, 4096, 1024)
        8192
    """

    rank: int | Mapping[str, int] = 8
    gamma: float = 0.0

    draws: ClassVar = True
    trains: ClassVar = ("U",)
    smallest: ClassVar = (1, 2)
    resolved: ClassVar = ("rank",)
    learning_rates: ClassVar = {"vision": 3e-3, "language": 1e-3}
    latex: ClassVar[str] = r"W' = W_0 \prod_{i=1}^{r} (I - 2\,\hat u_i \hat u_i^\top)"
    reference: ClassVar = Reference(
        key="yuan2024hra",
        authors="Yuan, Shen and Liu, Haotian and Xu, Hongteng",
        title="Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
        year=2024,
        venue="Advances in Neural Information Processing Systems",
        arxiv="2405.17484",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma < 0:
            raise ValueError(f"gamma {self.gamma} is negative")
        for rank in self.rank.values() if isinstance(self.rank, Mapping) else [self.rank]:
            if rank < 2 or rank % 2:
                near = max(2, rank - 1)
                raise ValueError(f"rank {rank}: reflections come in pairs, so that the start is exact; {near} would do")

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()) -> HRA:
        rank, most = chosen(self.rank, site, roles), n - n % 2
        if not most:
            raise ValueError(f"{site} has {n} input: there is nothing to reflect; leave it out with exclude=")
        if rank > most and not clip:
            raise ValueError(f"rank {rank} is outside [2, {most}] at {site} ({m}x{n}); clip_rank=True lowers it there")
        return dataclasses.replace(self, rank=min(rank, most))

    def start(self, w: Tensor, given: Given) -> Tensors:
        check_matrix(w, given.name)  # of zeros a factor makes zeros
        *batch, _, n = w.shape
        drawn = torch.rand(*batch, n, self._rank // 2, generator=generator(given.seed), dtype=torch.float64)
        half = (2 * drawn - 1) / math.sqrt(self._rank // 2)
        return {"U": half.repeat_interleave(2, -1).to(w)}

    def count(self, batch: int, m: int, n: int) -> int:
        """r n per matrix."""
        return batch * self._rank * n

    def export_rank(self, m: int, n: int) -> int:
        return min(self._rank, m, n)

    def knob_values(self, sites: Sequence[Given]) -> range:
        return range(2, 1 + max(2, *(site.shape[2] for site in sites)), 2)

    def thin(self, f: Factors, w0: Tensor) -> Product:
        x, y, inner = pairs(f.U.to(w0.dtype))
        return Product(w0 @ x, None, torch.linalg.solve_triangular(inner, y.mT, upper=True, unitriangular=True))

    def absolute(self, f: Factors, w0: Tensor) -> Tensor:
        u = unit(f.U.to(w0.dtype)).abs()
        each = torch.eye(u.shape[-2], dtype=u.dtype, device=u.device)
        total = each
        for i in range(self._rank):
            total = total @ (each + 2 * u[..., i : i + 1] @ u[..., i : i + 1].mT)
        return w0.abs() @ (total + each)

    def penalty(self, sites: Sequence[Factors]) -> Tensor | None:
        if self.gamma == 0:
            return None
        total = torch.zeros((), device=sites[0].U.device)
        for f in sites:
            u = unit(f.U)
            gram = u.mT @ u - torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
            total = total + torch.linalg.matrix_norm(gram).sum().to(total.device)
        return self.gamma * total


def unit(u: Tensor) -> Tensor:
    """The columns at length one."""
    return u / torch.linalg.vector_norm(u, dim=-2, keepdim=True)


def between(u: Tensor, v: Tensor) -> Tensor:
    """Return v̂ − û of columns, as exact for two that are nearly equal as v − u is.

    Example:
        >>> between(torch.tensor([[1.0], [0.0]]), torch.tensor([[3.0], [4.0]]))
        tensor([[-0.4000],
                [ 0.8000]])
    """
    step = v - u
    size_u, size_v = (torch.linalg.vector_norm(t, dim=-2, keepdim=True) for t in (u, v))
    longer = (step * (u + v)).sum(-2, keepdim=True) / (size_u + size_v)  # ‖v‖ − ‖u‖
    return (step - u * (longer / size_u)) / size_v


def pairs(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write a product of reflections as I + X T Yᵀ.

    Args:
        u: a normal per reflection, (*b, n, r), r even.

    Returns:
        X and Y, (*b, n, r), and T⁻¹, (*b, r, r), upper triangular with ones on its diagonal.

    Example:
        >>> u = torch.randn(5, 4, dtype=torch.float64)
        >>> x, y, inner = pairs(u)
        >>> h = torch.eye(5) + x @ torch.linalg.solve(inner, y.mT)
        >>> torch.allclose(h @ h.mT, torch.eye(5, dtype=torch.float64))
        True
    """
    one, two = u.unflatten(-1, (-1, 2)).unbind(-1)  # (*b, n, r/2)
    first, d = unit(one), between(one, two)
    bend = 2 * d.square().sum(-2, keepdim=True)  # 4 (1 − û_1ᵀû_2)
    x = torch.stack([first, d], -1).flatten(-2)
    y = torch.stack([(2 - bend) * d - bend * first, -2 * (first + d)], -1).flatten(-2)
    pair = torch.arange(u.shape[-1], device=u.device) // 2
    later = pair.unsqueeze(-1) < pair  # above the blocks of the pairs
    return x, y, torch.eye(u.shape[-1], dtype=u.dtype, device=u.device) - (y.mT @ x) * later
