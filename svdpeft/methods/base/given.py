"""What a method may know of a site when it starts there."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

CPU = torch.device("cpu")


class Statistics(NamedTuple):
    """What a calibration saw of one site: float32, summed over everything it was shown.

    Args:
        count: number of input vectors.
        second: Σ x xᵀ, (*b, n, n).
        total: Σ x, (*b, n).
        gradient: mean over the batches of ∂loss/∂W, (*b, m, n).
        kept: mean of x xᵀ on data whose outputs are to stay, (*b, n, n).
    """

    count: int = 0
    second: Float[Tensor, "*b n n"] | None = None
    total: Float[Tensor, "*b n"] | None = None
    gradient: Float[Tensor, "*b m n"] | None = None
    kept: Float[Tensor, "*b n n"] | None = None


class Partner(NamedTuple):
    """The other weight of a pair, of which only the product counts, head by head.

    Args:
        pair: ``"qk"``, where the site is the query, or ``"vo"``, where it is the output projection.
        weight: gives the key, or the value, as matrices (h, d, n); h divides the number of heads of the site.
    """

    pair: str
    weight: Callable[[], Tensor]


@dataclass(frozen=True)
class Given:
    """One site as a method sees it when it starts there.

    Args:
        name: of the site.
        shape: (batch, m, n).
        seed: of this site, different from every other site's.
        weight: gives the weight as matrices, (*b, m, n), finite, float32 or float64.
        roles: further names of the site.
        statistics: what ``svdpeft.calibrate`` saw of it.
        shared: the tensors that the site shares with its group, by name.
        position: of the site among those that are adapted together, in the model's order.
        origin: the seed of the attachment, the same for all sites.
        dtype: in which the method computes.
        device: of the weight.
        partner: the other half of the pair that the site belongs to, for methods with ``pairs``.
    """

    name: str
    shape: tuple[int, int, int]
    seed: int
    weight: Callable[[], Tensor]
    roles: tuple[str, ...] = ()
    statistics: Statistics | None = None
    shared: dict[str, Tensor] = field(default_factory=dict)
    position: int = 0
    origin: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    partner: Partner | None = None

    def sharing(self, shared: dict[str, Tensor]) -> Given:
        """The same site with what its group shares."""
        return replace(self, shared=shared)

    def seed_of(self, group: str | None) -> int:
        """A seed for what a group shares: of the attachment's seed and the group's name, not of who is in it."""
        return zlib.crc32(f"{self.origin}/{group}".encode())

    def module_type(self, words: int = 1) -> str:
        """What the site is called in every block: the last parts of its name that are not numbers.

        Example:
            >>> Given("layers.3.attn.q_proj", (1, 8, 8), 0, torch.Tensor).module_type(2)
            'attn.q_proj'
        """
        return ".".join([part for part in self.name.split(".") if not part.isdigit()][-words:])

    def seen(self, what: str, method: str) -> Tensor:
        """Return one of the statistics.

        Raises:
            ValueError: there is no calibration, or it did not see this.
        """
        if self.statistics is None or (found := getattr(self.statistics, what)) is None:
            needed = "gradients" if what == "gradient" else "inputs"
            call, of = f"svdpeft.calibrate(model, batches, {needed}=True)", self.name
            if what == "kept":
                call, of = f"{call}.preserving(svdpeft.calibrate(model, kept))", f"{of} on data that are to be kept"
            raise ValueError(f"{method} starts from the {needed} of {of}: pass attach(..., calibration={call})")
        return found

    def check_seen(self, needs: str, method: str) -> None:
        """Raise ``ValueError`` where a calibration lacks what a method needs of the site, or has it in other shapes."""
        batch, m, n = self.shape
        what, shape = ("second", (batch, n, n)) if needs == "inputs" else ("gradient", (batch, m, n))
        found = self.seen(what, method)
        if (found.numel() // max(math.prod(found.shape[-2:]), 1), *found.shape[-2:]) != shape:
            raise ValueError(
                f"the calibration is of another model: at {self.name} it has {needs} of shape {list(found.shape)}, "
                f"where {batch} matrices of {m}x{n} are"
            )


def generator(seed: int) -> torch.Generator:
    """A CPU generator: a seed means the same numbers on every device and leaves the global state alone."""
    return torch.Generator().manual_seed(seed)
