"""One look at a model: what its weights' spectra are, and what an adapter has done to them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from svdpeft.adapter.adapter import Adapter
from svdpeft.analysis import tables
from svdpeft.analysis.matrices import Matrix, Patterns, matrices_of
from svdpeft.analysis.measures import change_of, factors_of, numbers, principal_rank, spectrum_of
from svdpeft.analysis.spectra import decompose, energy_rank
from svdpeft.decomposition import check_matrix, uncached


@dataclass
class Inspection:
    """What ``inspect`` found.

    Args:
        table: a row per site.
        spectra: its singular values, (b, K), on the CPU; of W' where an adapter changes the weight.
        energy: the share that ``energy_rank`` keeps.
    """

    table: list[tables.Row] = field(default_factory=list)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    energy: float = 0.9

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain JSON."""
        return {"energy": self.energy, "sites": self.table}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table, one line per site."""
        tables.write_csv(self.table, path)


@torch.no_grad()
def inspect(
    what: nn.Module | Mapping[str, Tensor] | Adapter,
    targets: Patterns = "all",
    energy: float = 0.9,
    progress: Callable[[Sequence[Matrix]], Iterable[Matrix]] = iter,
) -> Inspection:
    """Return the spectra of a model's weights; of an adapter also how far it has moved them.

    Per site: ``sigma_max``, ``condition`` σ_1/σ_K, ``effective_rank``, ``stable_rank`` and ``energy_rank``, the
    smallest rank that keeps the share of ‖W‖_F². Of an adapter these are of W' = W0 + ΔW, and the columns of
    ``DriftTracker`` follow. Of a site with several matrices (experts, groups of a convolution) σ_1, condition numbers
    and ranks of the energy are the largest, everything else is the mean. Nothing is changed. One site at a time is in
    memory.

    Args:
        what: a model; an adapter (its sites, and the matrices that it trains whole); or weights by name, each
            (…, m, n): a batch of matrices of its last two axes.
        targets: as in ``attach``; ``"all"`` is every weight of a known kind but the output head.
        energy: between 0 and 1.
        progress: called with the matrices, gives them one by one (a progress bar).

    Raises:
        ValueError: a pattern names nothing; a weight holds NaN; an energy outside (0, 1].

    Example:
        >>> found = inspect({"a": torch.diag(torch.tensor([3.0, 1.0, 1.0]))})
        >>> [(row["site"], row["condition"], row["energy_rank"]) for row in found.table]
        [('a', 3.0, 2)]
    """
    energy_rank(torch.ones(1), energy)  # an energy that makes no sense is told before the work
    found = Inspection(energy=energy)
    for matrix in progress(matrices_of(what, targets, "targets")):
        w = matrix.base()
        check_matrix(w, matrix.name, zero=True)
        m, n = w.shape[-2:]
        values: dict[str, Tensor] = {}
        if matrix.change is None:
            s = torch.linalg.svdvals(w)
        else:
            change = matrix.change().to(w)
            check_matrix(change, f"the update of {matrix.name}", zero=True)
            start = decompose(w, matrix.name)
            with uncached():
                now = decompose(w + change, matrix.name)
            values = change_of(start, now, change, principal_rank(matrix.rank, start.s)) | factors_of(matrix.site)
            s = now.s
        row = numbers(spectrum_of(s, energy) | values)
        row["energy_rank"] = int(row["energy_rank"] or 0)
        count = s.numel() // s.shape[-1]
        found.table.append({"site": matrix.name, "matrices": count, "m": m, "n": n, **row})
        found.spectra[matrix.name] = s.reshape(count, -1).cpu()
    return found
