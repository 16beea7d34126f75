"""CLOVER: train the dense core of a product of two attention weights, head by head.

    W' = W0 + L (C − C₀) A for each head, changing one weight of the pair:
    value–output    W_O W_V = U S Vᵀ      L = U     A = T       C₀ = S    W_O' = U C T
    query–key       W_Qᵀ W_K = U S Vᵀ     L = Tᵀ    A = Uᵀ      C₀ = S    W_Q' = Tᵀ C Uᵀ
    where T is the d×d matrix that makes Vᵀ of the other weight: Vᵀ = T W_V, Vᵀ = T W_K

The product is U C Vᵀ (of a query U Cᵀ Vᵀ, the same family), as in the paper. There both weights are replaced, by U and
V; here one stays as it is, so that the base is untouched and several query heads may share a key and a value.
Biases stay as they are. Computed through QR of the thin matrices; no n×n product is formed.

F. Meng, P. Tang, F. Jiang, M. Zhang. CLOVER: Cross-Layer Orthogonal Vectors Pruning and Fine-Tuning. ICML 2025,
arXiv:2411.17426.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.decomposition import canonical_signs, truncated_svd
from svdpeft.methods.base import Given, Kind, Reference, Tensors, Unscaled
from svdpeft.registry import METHODS

PAIRS = ("qk", "vo")


@METHODS.register("clover")
@dataclass(frozen=True)
class CLOVER(Unscaled):
    """A d×d matrix per head and pair: what the head compares, and what it passes on, mixed anew.

    When to use:
        Attention with large heads, where an update of full rank within each head is wanted for few numbers; it says
        nothing about the feed-forward layers. Each adapted projection costs as much as the layer once more, so merge
        for use. It needs to know where the heads are: an attention that is not known here is left out, and so is
        query–key wherever queries are turned by their position or normalised, which is most language models of today.

    Paper and code:
        The paper replaces both weights of a pair by orthonormal ones; here one changes and the other stays. The family
        of functions is the same, the gradient of C too.
        With rotary positions the paper orthogonalises the key alone, and it treats MLP.up in blocks of 64; neither is
        a product of a pair, and neither is offered.
        A rank below d trains the leading r×r block of the core and leaves the rest of the product (ours).

    Args:
        rank: r of each core; ``None`` is d, the size of a head, as in the paper.
        pairs: which products: ``"qk"`` changes queries, ``"vo"`` output projections.

    Example:
        >>> CLOVER().at("blocks.0.attn.proj", 768, 64).count(12, 768, 64)
        49152
    """

    rank: int | Mapping[str, int] | None = None
    pairs: tuple[str, ...] = PAIRS  # type: ignore[misc]

    learning_rates: ClassVar = {"vision": 3e-3, "language": 1e-4}
    example: ClassVar[str] = """\
import svdpeft
import timm

model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10)
adapter = svdpeft.attach(model, svdpeft.CLOVER(), train=["head"])
print(adapter.summary())
"""
    trains: ClassVar = ("C",)
    latex: ClassVar[str] = (
        r"W_O^{h\prime} = W_O^h + U\,(C - \Sigma)\,T,\qquad W_O^h W_V^h = U \Sigma V^\top,\quad V^\top = T\, W_V^h"
    )
    reference: ClassVar = Reference(
        key="meng2025clover",
        authors="Meng, Fanxu and Tang, Pingzhi and Jiang, Fan and Zhang, Muhan",
        title="CLOVER: Cross-Layer Orthogonal Vectors Pruning and Fine-Tuning",
        year=2025,
        venue="International Conference on Machine Learning",
        arxiv="2411.17426",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs = (self.pairs,) if isinstance(self.pairs, str) else tuple(self.pairs)
        if not pairs or not set(pairs) <= set(PAIRS):
            raise ValueError(f"pairs {self.pairs!r} must be some of {', '.join(PAIRS)}")
        object.__setattr__(self, "pairs", tuple(pair for pair in PAIRS if pair in pairs))

    def why_not(self, kind: Kind) -> str | None:
        if not kind.heads:
            return "CLOVER decomposes products of two weights of an attention, head by head; one weight alone is none"
        return super().why_not(kind)

    def start(self, w: Tensor, given: Given) -> Tensors:
        assert given.partner is not None, "only halves of pairs are sites"
        query = given.partner.pair == "qk"
        left = (w.mT if query else w).double()  # (H, m, d)
        right = given.partner.weight().double()  # (h, d, n)
        _, d, n = right.shape
        if min(left.shape[-2], n) < d:
            raise ValueError(f"{given.name}: heads of {d} channels do not fit a weight of {left.shape[-2]}x{n}")
        right = torch.linalg.qr(right.mT).R  # (h, d, d), triangular; R[i]ᵀ Qᵀ is the weight
        self._check(right, w.dtype, given.name)
        right = right.repeat_interleave(len(left) // len(right), 0)  # (H, d, d)
        q, r = torch.linalg.qr(left)
        u, s, vh = truncated_svd(r @ right.mT, self._rank, "exact", where=given.name)
        u, vh = canonical_signs(q @ u, vh)  # of the product's own left vectors
        t = torch.linalg.solve_triangular(right, vh.mT, upper=True).mT  # (H, r, d): T Rᵀ = Vᵀ Q
        core = torch.diag_embed(s)
        factors = {"L": t.mT, "C": core, "A": u.mT} if query else {"L": u, "C": core, "A": t}
        return {name: tensor.to(w).contiguous() for name, tensor in factors.items()}

    @staticmethod
    def _check(right: Tensor, dtype: torch.dtype, name: str) -> None:
        """Refuse a key or value whose rows depend on each other: what it leaves out, no T brings back."""
        s = torch.linalg.svdvals(right)
        # T is stored in the weight's dtype: at the limit Vᵀ = T W_V is right to a percent in its weakest direction.
        share, limit = s[:, -1] / s[:, 0].clamp_min(torch.finfo(s.dtype).tiny), 100 * torch.finfo(dtype).eps
        if bool((share < limit).any()):
            head = int(share.argmin())
            raise ValueError(
                f"{name}: the other weight of its pair is rank-deficient in head {head}, smallest over largest "
                f"singular value {float(share[head]):.1e} < {limit:.1e}; exclude this layer"
            )

    def count(self, batch: int, m: int, n: int) -> int:
        """r² per head, H d² per pair at full rank."""
        return batch * self._rank**2
