"""The methods that learn a few coefficients of a transform of the update, at entries that are drawn once.

W' = W0 + α T⁻¹(S)        S (m, n) = c at n_f entries, 0 elsewhere
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from svdpeft.methods.base.factors import Factors, Tensors
from svdpeft.methods.base.given import Given, generator
from svdpeft.methods.base.transform import Transform


@dataclass(frozen=True)
class Spectrum(Transform):
    """Abstract: it must say ``delta`` and ``absolute``, of ``f.c`` at ``f.index``, which all layers of a shape share.

    Args:
        frequencies: n_f, number of coefficients, at most m n; ``clip_rank`` lowers it there.
        alpha: α.
    """

    frequencies: int = 1000
    alpha: float = 1.0

    trains: ClassVar = ("c",)
    knob: ClassVar[str] = "frequencies"
    resolved: ClassVar = ("frequencies",)
    draws: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frequencies < 1:
            raise ValueError(f"frequencies {self.frequencies} is below 1")

    def at(self, site: str, m: int, n: int, clip: bool = False, roles: Sequence[str] = ()):
        if self.frequencies > m * n and not clip:
            raise ValueError(
                f"frequencies {self.frequencies} is more than the {m * n} entries of {site} ({m}x{n}); "
                "clip_rank=True lowers it there"
            )
        return dataclasses.replace(self, frequencies=min(self.frequencies, m * n))

    def group(self, given: Given) -> str:
        _, m, n = given.shape
        return f"{self.name} {m}x{n} {self.frequencies}"

    def share(self, group: Sequence[Given]) -> Tensors:
        given = group[0]
        _, m, n = given.shape
        drawn = torch.randperm(m * n, generator=generator(given.seed_of(self.group(given))))
        return {"index": drawn[: self.frequencies].to(given.device)}

    def start(self, w: Tensor, given: Given) -> Tensors:
        return {"c": w.new_zeros(*w.shape[:-2], self.frequencies)}

    def count(self, batch: int, m: int, n: int) -> int:
        """n_f per matrix."""
        return batch * self.frequencies

    def knob_values(self, sites: Sequence[Given]) -> range:
        return range(1, 1 + max(m * n for _, m, n in (site.shape for site in sites)))

    def spread(self, c: Float[Tensor, "*b f"], f: Factors, m: int, n: int) -> Float[Tensor, "*b m n"]:
        """Return S, the coefficients at their entries."""
        return c.new_zeros(*c.shape[:-1], m * n).index_copy(-1, f.index, c).unflatten(-1, (m, n))

    def acts(self, linear: bool) -> bool:
        return linear
