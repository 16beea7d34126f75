"""FRoD: one input basis for all layers of a module type; each layer trains its scaling and a few rotations in it.

    W' = W0 + U (diag(λ) + S) Vᵀ − U diag(λ₀) Vᵀ        W0 = U diag(λ₀) Vᵀ    S = 0, sparse off the diagonal

    V = Rᵀ E        Q R: of all W one above the other        E: eigenvectors of the mean of (QᵢᵀQᵢ + εI)⁻¹

V (n×n) is shared by the sites of one module type and width; U (m×n), with columns of length one, is each site's own.
Where there is one W only, or they have fewer rows together than columns, or not full rank, V holds their right singular
vectors. λ (n) trains, and S at ⌊ρ n²⌋ positions that are drawn once per module type (at least one, if ρ > 0).

G. Wan, T. Chen, F. Feng, H. Zhou, R. Xu. FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees for Fast
Convergence. AAAI 2026, arXiv:2512.23485.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.decomposition import Product, canonical, canonical_signs, check_matrix, scatter_core, truncated_svd
from svdpeft.methods.base import Factors, Given, Reference, Tensors, Unscaled, generator
from svdpeft.registry import METHODS

EQUAL = 1e-10  # eigenvalues that are closer, relative to the largest, are one: inverses have lost that many digits


@METHODS.register("frod")
@dataclass(frozen=True)
class FRoD(Unscaled):
    """Full-rank updates in a basis that layers of one kind have in common.

    When to use:
        Where rank is the limit and memory is not: each site keeps U, as large as its weight, each module type an n×n V,
        and a forward builds an n×n core per site. The start reads the weights one at a time and works in float64 on
        some ten n×n matrices. A module type with fewer rows in all than columns has directions without any weight:
        their coefficients get no gradient. The basis depends on every layer of the type.

    Paper and code:
        The paper and its code put U (diag(λ) + S) Vᵀ in the place of W0, off it by the error of the solve; here the
        difference from the start is added, so that the start is exact.
        The code replaces the joint basis by singular vectors for few rows. Here also for weights of deficient rank, and
        for a single weight, where the joint basis is undetermined (eigenvectors of a multiple of the identity).
        The code keeps directions of length above 1e-12; here above rounding, relative to the longest.

    Args:
        rank: none, the rank is full.
        density: ρ, the share of S that trains.
        ridge: ε, keeps the inverses of correlated layers finite.

    Example:
        >>> FRoD().count(1, 768, 768)
        6666
    """

    rank: None = None
    density: float = 0.01
    ridge: float = 1e-3

    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    trains: ClassVar[tuple[str, ...]] = ("C", "S")
    knob: ClassVar[str] = "density"
    reference: ClassVar = Reference(
        key="wan2026frod",
        authors="Wan, Guoan and Chen, Tianyu and Feng, Fangzheng and Zhou, Haoyi and Xu, Runhua",
        title="FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees for Fast Convergence",
        year=2026,
        venue="AAAI Conference on Artificial Intelligence",
        arxiv="2512.23485",
    )
    resolved: ClassVar = ()
    draws: ClassVar = True
    latex: ClassVar[str] = r"W' = W_0 + U \bigl(\operatorname{diag}(\lambda - \lambda_0) + S\bigr) V^\top"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None:
            raise ValueError(f"rank {self.rank!r}: FRoD is of full rank; density= is what makes it larger or smaller")
        if not 0 <= self.density <= 1:
            raise ValueError(f"density {self.density} is outside [0, 1]")
        if self.ridge <= 0:
            raise ValueError(f"ridge {self.ridge} is not positive")

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()) -> FRoD:
        return self

    def entries(self, n: int) -> int:
        """Number of entries of S that train."""
        return min(max(int(self.density * n * n), int(self.density > 0)), n * (n - 1))

    def group(self, given: Given) -> str:
        return f"{given.module_type(2)} n={given.shape[2]}"

    def share(self, group: Sequence[Given]) -> Tensors:
        n, first = group[0].shape[2], group[0]
        basis = joint_basis(sorted(group, key=lambda site: site.name), self.ridge)
        random = generator(first.seed_of(self.group(first)))
        drawn = torch.randperm(n * (n - 1), generator=random)[: self.entries(n)].sort().values
        i, j = drawn // max(n - 1, 1), drawn % max(n - 1, 1)  # the j-th entry off the diagonal of row i
        return {"V": basis.to(first.dtype), "index": (i * n + j + (j >= i)).to(first.device)}

    def start(self, w: Tensor, given: Given) -> Tensors:
        check_matrix(w, given.name)
        rows = torch.linalg.solve(given.shared["V"].detach().double(), w.double().flatten(0, -2).mT)
        u = rows.mT.reshape(w.shape)  # W V⁻ᵀ
        length = u.norm(dim=-2)  # (*b, n)
        noise = max(w.shape[-2:]) * torch.finfo(w.dtype).eps * length.amax(-1, keepdim=True)
        length = length.masked_fill(length <= noise, 0.0)
        u = torch.where(length.unsqueeze(-2) > 0, u / length.unsqueeze(-2), 0.0)
        values = w.new_zeros(*w.shape[:-2], given.shared["index"].numel())
        return {"L": u.to(w), "C": length.to(w), "S": values}

    def _product(self, f: Factors, core: Tensor) -> Product:
        return Product(f.L, core, f.V.mT.expand(*f.C.shape, -1))

    def now(self, f: Factors) -> Product:
        return self._product(f, torch.diag_embed(f.C) + scatter_core(f.S, f.index, f.C.shape[-1]))

    def anchor(self, f: Factors) -> Product:
        return self._product(f, f.C0)

    def update(self, f: Factors) -> Product:
        # Not the difference of now and anchor, which do not know that they have V in common.
        return self._product(f, torch.diag_embed(f.C - f.C0) + scatter_core(f.S, f.index, f.C.shape[-1]))

    def count(self, batch: int, m: int, n: int) -> int:
        """n + ⌊ρ n²⌋ per matrix."""
        return batch * (n + self.entries(n))

    def export_rank(self, m: int, n: int) -> int:
        return min(m, n)

    def knob_values(self, sites: Sequence[Given]) -> list[float]:
        return [i / 10_000 for i in range(10_001)]


def joint_basis(sites: Sequence[Given], ridge: float) -> Tensor:
    """V for a module type, float64; reads the weights one by one, twice.

    The columns' signs are chosen like those of singular vectors.
    """
    n = sites[0].shape[2]
    r = sites[0].weight().new_zeros(0, n, dtype=torch.float64)
    for site in sites:  # R of all of them, without stacking them
        r = torch.linalg.qr(torch.cat([r, site.weight().double().flatten(0, -2)]), mode="r").R
    size, count = r.diagonal().abs(), sum(site.shape[0] for site in sites)
    if count == 1 or len(r) < n or size.min() <= n * torch.finfo(torch.float64).eps * size.max():
        square = torch.cat([r, r.new_zeros(n - len(r), n)])  # all n right vectors, where there are fewer rows
        v = truncated_svd(square, None, "exact", where=sites[0].name).vh.mT
    else:
        total, identity = torch.zeros_like(r), torch.eye(n, dtype=r.dtype, device=r.device)
        matrices = (w for site in sites for w in site.weight().double().reshape(-1, *site.shape[1:]))
        for w in matrices:
            q = torch.linalg.solve_triangular(r, w, upper=True, left=False)
            total += torch.linalg.inv(q.mT @ q + ridge * identity)
        values, vectors = (t.flip(-1) for t in torch.linalg.eigh(total / count))
        v = r.mT @ canonical(vectors, values, vectors.mT, EQUAL)[0].flip(-1)
    return canonical_signs(v, v.mT)[0]
