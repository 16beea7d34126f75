"""Whole: a weight, or a part of it, trains whole, as values of the adapter's own.

    W' = W        W = W0 at the start

Of chosen rows of an embedding this is how new tokens are learned, as in textual inversion:
``attach(train={"embed_tokens": [ids]})`` takes it for those rows. The values do not depend on W0, so an adapter of a
base whose new rows were drawn at random fits one where they were drawn again.

R. Gal, Y. Alaluf, Y. Atzmon, O. Patashnik, A. H. Bermano, G. Chechik, D. Cohen-Or. An Image is Worth One Word:
Personalizing Text-to-Image Generation using Textual Inversion. ICLR 2023, arXiv:2208.01618.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from svdpeft.methods.base import Factors, Given, Reference, Tensors, Transform
from svdpeft.registry import METHODS


@METHODS.register("whole")
@dataclass(frozen=True)
class Whole(Transform):
    """Full fine-tuning of single weights, or of parts of them, in float32 and beside the base.

    When to use:
        For the rows of new tokens, one part of a fused weight, or a small layer that must change entirely. It adds
        up with other adapters as every update does. ``attach(train=…)`` exchanges the parameter itself, and is
        cheaper for a head; ``Full`` trains all of a model. It holds a copy of what it trains, and no LoRA can hold it.

    Paper and code:
        Textual inversion trains the vector of one new word of a text encoder, and starts from the vector of a word that
            is like it; here it starts from what the base holds in that row.

    Example:
        >>> model = nn.Embedding(6, 4)
        >>> adapter = svdpeft.attach(model, svdpeft.Whole(), "all")
        >>> adapter.trainable_count
        24
    """

    trains: ClassVar[tuple[str, ...]] = ("W",)
    depends_on_base: ClassVar[bool] = False
    learning_rates: ClassVar = {"vision": 1e-3, "language": 2e-5}  # of full fine-tuning
    reference: ClassVar = Reference(
        key="gal2023image",
        authors="Gal, Rinon and Alaluf, Yuval and Atzmon, Yuval and Patashnik, Or and Bermano, Amit H. and "
        "Chechik, Gal and Cohen-Or, Daniel",
        title="An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion",
        year=2023,
        venue="International Conference on Learning Representations",
        arxiv="2208.01618",
    )
    latex: ClassVar[str] = r"W' = W,\qquad W = W_0 \ \mathrm{at\ the\ start}"

    def start(self, w: Tensor, given: Given) -> Tensors:
        return {"W": w.clone()}

    def count(self, batch: int, m: int, n: int) -> int:
        """m n per matrix."""
        return batch * m * n

    def delta(self, f: Factors, w0: Float[Tensor, "*b m n"]) -> Float[Tensor, "*b m n"]:
        return f.W.to(w0.dtype) - w0

    def absolute(self, f: Factors, w0: Float[Tensor, "*b m n"]) -> Float[Tensor, "*b m n"]:
        return f.W.abs() + w0.abs()
