"""Rules for the gradients of two thin factors that both train, between the backward pass and the optimizer's step.

Of a change s L C A with Q = L C and P = C A, and G the gradient of the loss with respect to it, autograd gives

    g_L = s G Pᵀ        g_A = s Qᵀ G

which depend on how the product is split: L → L T, A → T⁻¹ A is the same weight, and takes another step. A rule puts
gradients in their place whose step does not. C, where there is one, is stepped by its own gradient as ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from svdpeft.adapter.assembling import in_place
from svdpeft.decomposition import Product
from svdpeft.methods.base import Factors, Method, PerSite, check_numbers
from svdpeft.registry import near_miss
from svdpeft.sites.site import Site


class Rule(Protocol):
    """What a rule is: a function of factors and gradients of equal shapes, stacked, of any number of sites."""

    def __call__(
        self,
        left: Float[Tensor, "*b m r"],
        right: Float[Tensor, "*b r n"],
        of_left: Float[Tensor, "*b m r"],
        of_right: Float[Tensor, "*b r n"],
        scale: float,
    ) -> tuple[Float[Tensor, "*b m r"], Float[Tensor, "*b r n"]]:
        """Return the gradients of L and A that the optimizer is given.

        Args:
            left: Q = L C.
            right: P = C A.
            of_left: g_L, the gradient of the loss with respect to L.
            of_right: g_A.
            scale: s.
        """
        ...


@dataclass(frozen=True)
class Riemannian:
    """Gradients in the metric of the product: with plain descent, scaled GD; with AdamW, scaled AdamW.

        g_L ← g_L (P Pᵀ + δI)⁻¹        g_A ← (QᵀQ + δI)⁻¹ g_A

    With δ → 0 the change of s Q P in one step of descent is −η s² (G Π_P + Π_Q G) to first order, Π the projectors on
    the rows of P and the columns of Q. It is the same however the product is split.

    Args:
        delta: δ; 1e-6 in the published code, 1e-2 in PEFT. 0 is for factors of full rank, which LoRA's L = 0 is not.

    Example:
        >>> rule = Riemannian(delta=0.0)
        >>> left, right = torch.full((3, 1), 2.0), torch.ones(1, 4)
        >>> [g.unique().item() for g in rule(left, right, torch.ones(3, 1), torch.ones(1, 4), 1.0)]  # 1/4 and 1/12
        [0.25, 0.0833333358168602]

    Source: F. Zhang, M. Pilanci. Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models. ICML 2024,
    arXiv:2402.02347. The published AdamW moves A before it makes the preconditioner of L; here both are of one moment.
    """

    delta: float = 1e-6

    def __post_init__(self) -> None:
        _check_delta(self)

    def __call__(
        self, left: Tensor, right: Tensor, of_left: Tensor, of_right: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        grams = (right @ right.mT, left.mT @ left)
        # inv_ex looks at no result: the host does not wait for the device.
        of_rows, of_columns = (torch.linalg.inv_ex(_raised(gram, self.delta)).inverse for gram in grams)
        return of_left @ of_rows, of_columns @ of_right


@dataclass(frozen=True)
class LoRAPro:
    """The gradients whose step in the product is nearest to the one that full fine-tuning would take.

        minimise ‖s (g_L' P + Q g_A') − G‖_F
        g_A' = s⁻² (QᵀQ)⁻¹ g_A + X P        g_L' = s⁻² (I − Q (QᵀQ)⁻¹ Qᵀ) g_L (P Pᵀ)⁻¹ − Q X

    Every X is a minimum; of these the one nearest to the gradients that there were solves

        QᵀQ X + X P Pᵀ = −s⁻² (QᵀQ)⁻¹ g_A Pᵀ

    by two eigendecompositions of r×r matrices per shape, for which torch has the host wait on a GPU.

    Args:
        delta: added to the eigenvalues of QᵀQ and P Pᵀ, as the published code adds it to the matrices; 0 as above.

    Example:
        >>> left, right = torch.zeros(3, 1), torch.ones(1, 4)  # LoRA's start: L alone moves
        >>> of_left, of_right = LoRAPro()(left, right, torch.ones(3, 1), torch.zeros(1, 4), 1.0)
        >>> of_left.flatten().tolist(), of_right.flatten().tolist()  # 1/4
        ([0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0])

    Source: Z. Wang, J. Liang, R. He, Z. Wang, T. Tan. LoRA-Pro: Are Low-Rank Adapters Properly Optimized? ICLR 2025,
    arXiv:2407.18242. With plain descent it is the paper's. The published Adam keeps its two averages of the m×n step,
    as much memory as full fine-tuning has; here an optimizer's averages are of the corrected gradients.
    """

    delta: float = 1e-8

    def __post_init__(self) -> None:
        _check_delta(self)

    def __call__(
        self, left: Tensor, right: Tensor, of_left: Tensor, of_right: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        columns, u = torch.linalg.eigh(left.mT @ left)  # QᵀQ = U diag(columns) Uᵀ
        rows, v = torch.linalg.eigh(right @ right.mT)
        columns, rows = (values.clamp(min=0).unsqueeze(-1) + self.delta for values in (columns, rows))
        own = u @ (u.mT @ of_right / columns) / scale**2
        beside = (v @ (v.mT @ of_left.mT / rows)).mT / scale**2
        beside = beside - left @ (u @ (u.mT @ (left.mT @ beside) / columns))
        x = -u @ (u.mT @ own @ right.mT @ v / (columns + rows.mT)) @ v.mT
        return beside - left @ x, own + x @ right


def rule_for(value: str | Rule, methods: Iterable[Method]) -> Rule:
    """Return a rule for the gradients of what some methods train.

    Args:
        value: a name in ``RULES``, or a function.
        methods: each of which it must be defined for.

    Raises:
        ValueError: no rule has the name; a method that has no two factors of its own which both train, or that itself
            looks at gradients or changes them.
    """
    if isinstance(value, str) and value not in RULES:
        raise ValueError(f"gradients={value!r} is no rule for gradients: {near_miss(value, RULES)}")
    for method in methods:
        if not isinstance(method, PerSite) or method.pair is None:
            what = f"trains {', '.join(method.trains)}" if isinstance(method, PerSite) else "has no factors"
            raise ValueError(
                f"gradients={value!r} is a rule for two thin factors L and A that both train, and {method} {what}: it "
                "is defined for LoRA, PiSSA, SORSA, DoRA around one of them, and others of that form"
            )
        if method.changes_gradients or method.keeps_state:
            raise ValueError(
                f"gradients={value!r}: {method} itself acts on gradients, or keeps something of them from step to "
                "step, and would be given others than its own"
            )
    return RULES[value] if isinstance(value, str) else value


@torch.no_grad()
def correct(rule: Rule, sites: Sequence[Site]) -> None:
    """Put a rule's gradients in the place of those that there are: one batched call for sites of equal shapes.

    Raises:
        RuntimeError: there are none.
    """
    mine = [site for site in sites if site.method.pair is not None]
    with in_place([site.factors for site in mine], gradients=True) as whole:
        groups: dict[Any, list[tuple[Factors, Product]]] = {}
        for site, f in zip(mine, whole, strict=True):
            if f.L.grad is not None and f.A.grad is not None:
                product = site.method.pair(f).plain()  # type: ignore[misc]
                key = f.L.shape, f.A.shape, f.L.dtype, f.L.device, product.scale
                groups.setdefault(key, []).append((f, product))
        if not groups:
            raise RuntimeError(
                "no factor has a gradient for a rule to correct: call before_step after backward() and before "
                "zero_grad(). DeepSpeed takes its step within backward, and leaves none"
            )
        for group in groups.values():
            dtype = torch.promote_types(group[0][0].L.dtype, torch.float32)
            slopes = [[getattr(f, name).grad for f, _ in group] for name in "LA"]
            thin = ([p.cored() for _, p in group], [_beside(p) for _, p in group], *slopes)
            left, right, of_left, of_right = (torch.stack(tensors).to(dtype) for tensors in thin)
            found = rule(left, right, of_left, of_right, group[0][1].scale)
            for old, new in zip(slopes, found, strict=True):
                torch._foreach_copy_(old, list(new.unbind()))


def _beside(product: Product) -> Tensor:
    """C A."""
    core, right = product.tensor_core, product.A
    if core is None:
        return right
    return core.unsqueeze(-1) * right if core.ndim < right.ndim else core @ right


def _raised(gram: Tensor, delta: float) -> Tensor:
    return gram + delta * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _check_delta(rule: Riemannian | LoRAPro) -> None:
    check_numbers(rule)
    if rule.delta < 0:
        raise ValueError(f"delta {rule.delta} is negative")


RULES: dict[str, Rule] = {"riemannian": Riemannian(), "lora-pro": LoRAPro()}
