"""DoRA: magnitude and direction of the weight train apart, the direction by any method on the equation.

    W' = diag(mag / ‖W0 + ΔW‖) (W0 + ΔW)        ΔW of another method    ‖·‖ per row    mag = ‖W0‖ at the start

The update is written as diag(g − 1) W0 + diag(g) ΔW with g = mag / ‖W0 + ΔW‖, so that a called layer multiplies its own
output by g − 1 and adds a thin product. The norms come from the factors: ‖W0 + ΔW‖² − ‖W0‖² = 2⟨W0, ΔW⟩ + ‖ΔW‖².

S.-Y. Liu, C.-Y. Wang, H. Yin, P. Molchanov, Y.-C. F. Wang, K.-T. Cheng, M.-H. Chen. DoRA: Weight-Decomposed Low-Rank
Adaptation. ICML 2024, arXiv:2402.09353.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from svdpeft.decomposition import Product
from svdpeft.methods.base import Call, Factored, Factors, Given, Hooks, PerSite, Reference, Tensors, Transform
from svdpeft.methods.lora import LoRA
from svdpeft.registry import METHODS

AXES = ("rows", "columns")


@METHODS.register("dora")
@dataclass(frozen=True)
class DoRA(Transform):
    """A magnitude per output on top of LoRA, or of any other method on the equation.

    When to use:
        Where LoRA of a small rank falls short of full fine-tuning: one value more per output, for a result that is
        better in its paper. Beside the inner method it costs one product W0 Aᵀ and one pass over the output per
        forward, on layers that are called. The update has full rank: it can be merged, and no LoRA file can hold it.

    Paper and code:
        The paper writes a norm per column and one magnitude per input; its code and PEFT take one per row of an
            (out, in) weight, and so does ``magnitude="rows"``. ``"columns"`` is the paper's letter, and what PEFT does
            on embeddings.
        With dropout PEFT recomputes the base's share from the dropped input; here dropout acts on the inner update
            alone.

    Args:
        inner: the method that changes the direction: a method, its registry name, or a mapping of ``name`` and
            hyper-parameters. Where its own start is not the base model, DoRA starts where it does.
        magnitude: one per row of the matrices, or one per column. On a transposed convolution a row is an output at one
            position of the kernel, and on an embedding a token.
        norm_gradient: let gradients pass through the norm, which the paper takes for a constant to save memory.

    Example:
        >>> print(DoRA("pissa"))
        DoRA(PiSSA(rank=8))
        >>> DoRA({"name": "lora", "rank": 16}).count(1, 100, 50)  # 16 · 150 + 100
        2500
    """

    inner: Any = LoRA()  # noqa: RUF009 (frozen)
    magnitude: Literal["rows", "columns"] = "rows"
    norm_gradient: bool = False

    pairs: ClassVar = ()  # those are refused
    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-3}
    latex: ClassVar[str] = (
        r"W' = \operatorname{diag}\!\left(\frac{m}{\lVert W_0 + \Delta W\rVert}\right)(W_0 + \Delta W)"
    )
    reference: ClassVar = Reference(
        key="liu2024dora",
        authors="Liu, Shih-Yang and Wang, Chien-Yi and Yin, Hongxu and Molchanov, Pavlo and Wang, Yu-Chiang Frank and "
        "Cheng, Kwang-Ting and Chen, Min-Hung",
        title="DoRA: Weight-Decomposed Low-Rank Adaptation",
        year=2024,
        venue="International Conference on Machine Learning",
        arxiv="2402.09353",
    )

    def __post_init__(self) -> None:
        inner = self.inner
        if isinstance(inner, str):
            inner = METHODS[inner]()
        elif isinstance(inner, Mapping):
            options = dict(inner)
            if "name" not in options:
                raise ValueError(f"inner={inner!r} lacks 'name', the registry name of a method")
            inner = METHODS.make(options.pop("name"), options)
        if not isinstance(inner, Factored):
            raise ValueError(
                f"inner={inner}: DoRA needs the update of a method on the equation, a product of thin factors, to know "
                "the norm of the new weight without building it; such as LoRA, PiSSA or SORSA"
            )
        if inner.pairs:
            raise ValueError(f"inner={inner}: its update changes two weights together, DoRA's magnitudes belong to one")
        object.__setattr__(self, "inner", inner)
        super().__post_init__()
        if self.magnitude not in AXES:
            raise ValueError(f"magnitude {self.magnitude!r} is not one of {', '.join(AXES)}")

    def __str__(self) -> str:
        words = [str(self.inner)]
        words += ["magnitude='columns'"] if self.magnitude == "columns" else []
        words += ["norm_gradient=True"] if self.norm_gradient else []
        return f"{type(self).__name__}({', '.join(words)})"

    # -- the weight -----------------------------------------------------------------------------------------------

    def start(self, w: Tensor, given: Given) -> Tensors:
        inner = self.inner.factors(given)
        norm = torch.linalg.vector_norm(w, dim=self._summed)
        own = {name: t for name, t in inner.tensors().items() if name not in inner.tied}
        moved = norm
        if not self.exact_start:
            moved = torch.linalg.vector_norm(w + self.inner.update(inner).dense(), dim=self._summed)
        return own | {"mag": moved.detach().clone(), "norm0": norm}

    def gain(self, f: Factors, w0: Tensor, update: Product) -> Tensor:
        """Return g = mag / ‖W0 + ΔW‖, (*b, m) or (*b, n): exactly one while ΔW is zero and mag has its start value."""
        left, right, w = update.cored() * update.scale, update.A, w0  # (*b, m, r), (*b, r, n), (*b, m, n)
        if self.magnitude == "columns":
            left, right, w = right.mT, left.mT, w.mT
        growth = (left * (2 * (w @ right.mT) + left @ (right @ right.mT))).sum(-1)  # ‖W0 + ΔW‖² − ‖W0‖²
        norm0 = f.norm0.to(w0.dtype)
        some = (norm0 > 0) | (growth > 0)  # a row of zeros has no direction
        # Where ΔW takes away all but a thousandth of a row, what is left of the difference is rounding (float32).
        floor = torch.finfo(w0.dtype).eps * norm0.square()
        norm = torch.where(some, torch.maximum(norm0.square() + growth, floor), 1.0).sqrt()
        norm = norm if self.norm_gradient else norm.detach()
        return torch.where(some, f.mag.to(w0.dtype) / norm, 1.0)

    def delta(self, f: Factors, w0: Tensor) -> Tensor:
        update = self.inner.update(f).to(w0.dtype)
        gain = self.gain(f, w0, update).unsqueeze(self._summed)
        return (gain - 1) * w0 + gain * update.dense()

    def absolute(self, f: Factors, w0: Tensor) -> Tensor:
        update, axis = self.inner.update(f), self._summed
        own, new = update.absolute(), w0 + update.dense()
        # The norm is a sum of squares, of which those of W0 and of the update may cancel.
        sure = (w0.abs() + own).square().sum(axis, keepdim=True) / new.square().sum(axis, keepdim=True)
        gain = self.gain(f, w0, update).unsqueeze(axis)
        return (gain - 1).abs() * w0.abs() + gain.abs() * (own + sure * new.abs())

    def acts(self, linear: bool) -> bool:
        return True

    def act(self, f: Factors, call: Call) -> Tensor:
        w0 = call.w0
        update = self.inner.update(f).to(w0.dtype)
        gain = self.gain(f, w0, update)
        if self.magnitude == "rows":
            return call.add(call.rows(gain - 1), update._replace(L=gain.unsqueeze(-1) * update.L), self.dropout)
        return call.add(call.columns(gain - 1), update._replace(A=update.A * gain.unsqueeze(-2)), self.dropout)

    def count(self, batch: int, m: int, n: int) -> int:
        """That of the inner method, and one magnitude per row (or column)."""
        return self.inner.count(batch, m, n) + batch * (m if self.magnitude == "rows" else n)

    @property
    def _summed(self) -> int:
        return -1 if self.magnitude == "rows" else -2

    def tensor_names(self) -> list[str]:
        return [*self.inner.tensor_names(), "mag", "norm0"]

    @property
    def trains(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.inner.trains, "mag")

    def turned(self, value: Any) -> DoRA:
        return self._around(self.inner.turned(value))

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()) -> DoRA:
        return self._around(self.inner.at(site, m, n, clip, roles))

    def resolve(self, sites: Sequence[Given], clip: bool) -> list[PerSite]:
        return [self._around(inner) for inner in self.inner.resolve(sites, clip)]

    def general(self) -> DoRA:
        return self._around(self.inner.general())

    def _around(self, inner: PerSite) -> DoRA:
        return dataclasses.replace(self, inner=inner)


def _of_inner(name: str) -> property:
    """What the inner method says: a closure, which a compiler can follow."""
    return property(lambda self: getattr(self.inner, name))


# In everything else that a method may say the inner one has the word.
for hook in vars(Hooks):
    if not hook.startswith("_") and hook not in vars(DoRA):
        setattr(DoRA, hook, _of_inner(hook))
