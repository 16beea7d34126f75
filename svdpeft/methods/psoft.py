"""PSOFT: rotate the weight within its principal subspace.

    W' = W0 + L (C − I) A        L = U_r Σ_r    A = V_rᵀ    C = diag(β) R diag(α)

    cayley     R = (I + Q)(I − Q)⁻¹,  Q = −Qᵀ
    neumann    R = (I + Q)(I + Q + … + Q^terms): without a solve, orthogonal only for small Q

Q = 0 and α = β = 1 at the start.

F. Wu, J. Hu, G. Min, S. Wang. Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation. ICLR 2026,
arXiv:2505.11235.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdpeft.decomposition import TERMS, Product, cayley_neumann_offset, cayley_offset, skew, skew_count
from svdpeft.methods.base import Decomposed, Factors, Given, Reference, Tensors, Unscaled
from svdpeft.registry import METHODS

ROTATIONS = ("cayley", "neumann")
VECTORS = ("both", "input", "output", "none")


@METHODS.register("psoft")
@dataclass(frozen=True)
class PSOFT(Decomposed, Unscaled):
    """Orthogonal fine-tuning at the price of an r×r matrix, with two vectors that loosen it.

    When to use:
        Where angles and lengths among what the weight knows should survive: with ``vectors="none"`` the principal
        part keeps its singular values exactly. The number of values grows as r²/2, so ranks are large (46 to 424 in
        the paper) before they match a LoRA's, and each forward solves an r×r system, or multiplies ``terms`` of
        them. Nothing outside of the leading singular vectors is reached.

    Paper and code:
        The published code divides Σ_r by α/r and multiplies the update by it again, so that its α has no effect; here
        there is none.
        PEFT counts the terms of the Neumann series otherwise: its 5, the default, is ``terms=3`` here, its 3 and its
        4 are both ``terms=2``; the paper's K = 5 is ``terms=5``.
        PEFT's bound on ‖Q‖_F, which it leaves off by default: ``bound=0.9``. It applies to both rotations here.
        The code's free R in the place of a rotation, and √Σ_r on both sides, are not offered: LoRA-XS is the former.

    Args:
        rotation: ``"cayley"`` or ``"neumann"``, how R comes from Q.
        terms: highest power of the Neumann series; not used by ``"cayley"``.
        vectors: which of the two train: ``"both"``, α alone at the ``"input"``, β alone at the ``"output"``, or
            ``"none"``, which leaves a pure rotation.
        bound: Q is scaled back to this Frobenius norm where it is larger; ``None`` is no bound.

    Example:
        >>> PSOFT(rank=46).count(1, 768, 768), PSOFT(rank=46, vectors="none").count(1, 768, 768)
        (1127, 1035)
    """

    rank: int | dict[str, int] | None = 32
    rotation: Literal["cayley", "neumann"] = "cayley"
    terms: int = 5
    vectors: Literal["both", "input", "output", "none"] = "both"
    bound: float | None = None

    anchored: ClassVar = False  # the start of C is the identity: nothing to keep
    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    latex: ClassVar[str] = (
        r"W' = W_0 + U_r\Sigma_r\,(\mathrm{diag}(\beta)\,R\,\mathrm{diag}(\alpha) - I)\,V_r^\top,"
        r"\quad R = (I+Q)(I-Q)^{-1}"
    )
    reference: ClassVar = Reference(
        key="wu2026psoft",
        authors="Wu, Fei and Hu, Jia and Min, Geyong and Wang, Shiqiang",
        title="Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation",
        year=2026,
        venue="International Conference on Learning Representations",
        arxiv="2505.11235",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotation not in ROTATIONS:
            raise ValueError(f"rotation {self.rotation!r} is not one of {', '.join(ROTATIONS)}")
        if self.vectors not in VECTORS:
            raise ValueError(f"vectors {self.vectors!r} is not one of {', '.join(VECTORS)}")
        if not 1 <= self.terms <= TERMS:
            raise ValueError(f"terms {self.terms} is outside [1, {TERMS}], the powers of the series")
        if self.bound is not None and not self.bound > 0:
            raise ValueError(f"bound {self.bound} is not positive; None is no bound")

    @property
    def trains(self) -> tuple[str, ...]:  # type: ignore[override]
        turns = () if self.rank == 1 else ("Q",)  # one dimension does not turn
        alpha = ("alpha_vec",) if self.vectors in ("both", "input") else ()
        beta = ("beta_vec",) if self.vectors in ("both", "output") else ()
        return (*turns, *alpha, *beta)

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()):
        method = super().at(site, m, n, clip, roles)
        if not method.trains:
            raise ValueError(
                f"rank 1 at {site} ({m}x{n}): a rotation of one dimension is the identity, and with vectors='none' "
                "nothing else trains; exclude the site, or keep a vector"
            )
        return method

    def start(self, w: Tensor, given: Given) -> Tensors:
        u, s, vh = self.svd(w, given)
        tensors = {"L": u * s.unsqueeze(-2), "A": vh}
        if "Q" in self.trains:
            tensors["Q"] = w.new_zeros(*s.shape[:-1], skew_count(self._rank))
        return tensors | {name: torch.ones_like(s) for name in ("alpha_vec", "beta_vec") if name in self.trains}

    def change(self, f: Factors) -> Tensor:
        """C − I, (*b, r, r), or its diagonal where there is no rotation."""
        names = self.trains
        alpha = f.alpha_vec if "alpha_vec" in names else torch.ones_like(f.A[..., 0])
        beta = f.beta_vec if "beta_vec" in names else torch.ones_like(f.A[..., 0])
        # β R α − I = β (R − I) α + (β α − 1): no digit of a small rotation is lost to the identity
        diagonal = (beta - 1) * alpha + (alpha - 1)
        if "Q" not in names:
            return diagonal
        return beta.unsqueeze(-1) * self._turn(f.Q) * alpha.unsqueeze(-2) + torch.diag_embed(diagonal)

    def _turn(self, values: Tensor) -> Tensor:
        """R − I."""
        q = skew(values, self._rank)
        if self.bound is not None:
            q = q * (self.bound / torch.linalg.matrix_norm(q, keepdim=True).clamp_min(self.bound))
        return cayley_offset(q) if self.rotation == "cayley" else cayley_neumann_offset(q, self.terms)

    def core(self, f: Factors) -> Tensor:
        change = self.change(f)
        return change + torch.eye(self._rank, dtype=f.A.dtype, device=f.A.device) if "Q" in self.trains else change + 1

    def anchor(self, f: Factors) -> Product:
        return Product(f.L, None, f.A)

    def update(self, f: Factors) -> Product:
        return Product(f.L, self.change(f), f.A)

    def replaces_weight(self, m: int, n: int) -> bool:
        return self._rank == min(m, n)

    def count(self, batch: int, m: int, n: int) -> int:
        """r(r − 1)/2 per matrix, and r for each of the two vectors."""
        vectors = {"both": 2, "none": 0}.get(self.vectors, 1)
        return batch * (skew_count(self._rank) + vectors * self._rank)
