"""VB-LoRA: the factors of all layers are put together from one bank of short vectors.

    W' = W0 + L A − L₀A₀        piece = Σ_{i ∈ top k} softmax(z_i) bank_i

Every piece of b neighbouring entries, of a column of L and of a row of A, is a mixture of the k vectors of the bank
with the largest of its logits z. The bank, h vectors of length b, is one for all layers; each piece has h logits of its
own. bank ~ U(−0.02, 0.02), z ~ N(0, 0.1²), and L₀A₀ is what they make at the start.

Y. Li, S. Han, S. Ji. VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks. NeurIPS 2024,
arXiv:2405.15179.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdpeft.decomposition import Product
from svdpeft.methods.base import Factors, Given, Reference, Tensors, Unscaled, generator
from svdpeft.methods.base.divisors import common
from svdpeft.registry import METHODS

BOUND, SPREAD = 0.02, 0.1  # of the bank, and of the logits, at the start


@METHODS.register("vblora")
@dataclass(frozen=True)
class VBLoRA(Unscaled):
    """A row of A and a column of L are cut into pieces of b entries; each is a mixture of k vectors of the bank.

    When to use:
        Where very many adapters of one model are kept: what tells two of them apart is the bank and, per piece, k
        indices and k − 1 weights. A training holds all h logits of each piece, more than a LoRA's values where h > b.
        The paper trains the bank at 1e-3 and the logits at 1e-2: ``Trainer(role_lr={"bank": 1e-3})``.

    Paper and code:
        The paper and PEFT start at L₀A₀, some 1e-4 per entry, off the base model: ``reference_init=True``. Here it is
        subtracted, and kept as k indices and k logits per piece beside a frozen bank; such an adapter is a LoRA of
        rank 2r.
        PEFT writes indices and weights alone if asked, a file from which no training can go on; here a file has the
        logits.
        b divides both sides of every layer; where ``clip_rank`` takes a smaller one, there is a bank for each length.

    Args:
        vectors: h, number of vectors in the bank.
        vector_length: b; ``clip_rank`` takes the nearest common divisor below.
        top_k: k, at most h.
        reference_init: start as the published code does.

    Example:
        >>> method = VBLoRA(rank=4)
        >>> method.count(1, 1024, 4096), method.shared_count([])  # 256 · 4 · (1024 + 4096) / 256, 256 · 256
        (20480, 65536)
    """

    rank: int | dict[str, int] | None = 4
    vectors: int = 256
    vector_length: int = 256
    top_k: int = 2
    reference_init: bool = False

    example: ClassVar[str] = """\
import torch
from torch import nn
import svdpeft

model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 10))
adapter = svdpeft.attach(model, svdpeft.VBLoRA(), targets=["0"], train=["2"])
print(adapter.summary())
"""
    trains: ClassVar = ("bank", "left", "right")
    draws: ClassVar = True
    resolved: ClassVar = ("rank", "vector_length")
    learning_rates: ClassVar = {"vision": 1e-2, "language": 1e-2}
    latex: ClassVar[str] = (
        r"W' = W_0 + L A - L_0 A_0,\qquad \mathrm{piece} = \sum_{i \in \mathrm{top}\,k} \mathrm{softmax}(z)_i\, b_i"
    )
    reference: ClassVar = Reference(
        key="li2024vblora",
        authors="Li, Yang and Han, Shaobo and Ji, Shihao",
        title="VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks",
        year=2024,
        venue="Advances in Neural Information Processing Systems",
        arxiv="2405.15179",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vectors", "vector_length", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1")
        if self.top_k > self.vectors:
            raise ValueError(f"top_k {self.top_k} is more than the {self.vectors} vectors of the bank")

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        return not self.reference_init

    @property
    def anchored(self) -> bool:  # type: ignore[override]
        return not self.reference_init

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()) -> VBLoRA:
        size = common(self.vector_length, m, n, site, clip, word="vector_length")
        return dataclasses.replace(super().at(site, m, n, clip, roles), vector_length=size)

    def group(self, given: Given) -> str:
        return f"vblora b={self.vector_length}"

    def share(self, group: Sequence[Given]) -> Tensors:
        given = group[0]
        random = generator(given.seed_of(self.group(given)))
        drawn = torch.rand(self.vectors, self.vector_length, generator=random, dtype=torch.float64)
        bank = ((2 * drawn - 1) * BOUND).to(given.device, given.dtype)
        return {"bank": bank, **({"bank0": bank.clone()} if self.anchored else {})}

    def start(self, w: Tensor, given: Given) -> Tensors:
        *batch, m, n = w.shape
        random, tensors = generator(given.seed), {}
        for name, size in (("left", m), ("right", n)):
            shape = (*batch, self._rank, size // self.vector_length, self.vectors)
            z = (SPREAD * torch.randn(shape, generator=random, dtype=torch.float64)).to(w)
            tensors[name] = z
            if self.anchored:
                largest = z.topk(self.top_k, dim=-1)
                tensors |= {f"{name}_logits0": largest.values, f"{name}_index0": largest.indices}
        return tensors

    def tensor_names(self) -> list[str]:
        return [*self.trains, *(["bank0", "left_logits0", "right_logits0"] if self.anchored else [])]

    def count(self, batch: int, m: int, n: int) -> int:
        """h r (m + n) / b per matrix, and h b for all of them."""
        return batch * self.vectors * self._rank * (m + n) // self.vector_length

    def shared_count(self, group: Sequence[Given]) -> int:
        return self.vectors * self.vector_length

    def now(self, f: Factors) -> Product:
        left, right = (_pieces(f.bank, *z.topk(self.top_k, dim=-1)) for z in (f.left, f.right))
        return Product(left.mT, None, right)

    def anchor(self, f: Factors) -> Product | None:
        if not self.anchored:
            return None
        left = _pieces(f.bank0, f.left_logits0, f.left_index0)
        return Product(left.mT, None, _pieces(f.bank0, f.right_logits0, f.right_index0))

    def export_rank(self, m: int, n: int) -> int:
        return min((2 if self.anchored else 1) * self._rank, m, n)


def _pieces(bank: Tensor, logits: Tensor, index: Tensor) -> Tensor:
    """Mixtures of the bank's vectors, one after the other, (*b, r, pieces · b).

    Args:
        bank: h vectors, (h, b).
        logits: the k largest of each piece, (*b, r, pieces, k).
        index: of the vectors that they are of.
    """
    return (logits.softmax(-1).unsqueeze(-1) * bank[index]).sum(-2).flatten(-2)
