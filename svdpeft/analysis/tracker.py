"""ΔΣ, ΔD and the rest along a training, without saving weights: a callback of transformers' trainers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from svdpeft.adapter.adapter import Adapter
from svdpeft.analysis import tables
from svdpeft.analysis.matrices import Matrix, Patterns, matrices_of
from svdpeft.analysis.measures import COLUMNS, change_of, factors_of, numbers, principal_rank
from svdpeft.analysis.spectra import decompose
from svdpeft.decomposition import SVD, check_matrix, uncached

TOGETHER = 2**20  # entries of equally large matrices that are decomposed in one call


class DriftTracker(TrainerCallback):
    """Measure the weights that an adapter changes, at chosen steps of a training.

        ΔΣ = mean |σ_i(t) − σ_i(0)|        ΔD = 1 − ½ mean (|⟨u_i(t), u_i(0)⟩| + |⟨v_i(t), v_i(0)⟩|)

    on the merged weight W0 + ΔW of each site, which is formed here and thrown away: neither the model nor a random
    state is touched, so training is the same to the last bit. Make it after ``attach`` and before training; pass it in
    ``callbacks``, or call ``record(step)`` in a loop of your own. The start and the last step are always recorded.

    Memory: the singular triplets of the base in host memory, K(m + n + 1) float32 per m×n site, K = min(m, n), about
    twice the weight; there too, of weights that train whole (``Full``, ``Partial``), a copy. On the device nothing
    stays, but while a step is recorded about ten times one site's weight is in use, and a peak of the device's memory
    counts that. Inside ``svd_cache`` the base's SVD alone goes to the folder. Time: one whole SVD per site and step,
    O(K m n), in ``seconds``. In distributed training the main process alone does this; sharded factors (FSDP, DeepSpeed
    ZeRO-3) are not put together.

    Args:
        adapter: what trains: its sites, and the matrices that it trains whole.
        sites: which of them, as ``targets`` names them: ``"all"``, ``"q_proj|v_proj"``, ``["attn.qkv[q]", "fc1"]``.
        every: record every so many optimizer steps.
        steps: or at these.
        rank: r of the principal part and of the leading subspaces; ``None``: the rank of the site's method, and where
            it has none, or all of K, the rank that keeps 90 % of W0's energy.

    Raises:
        ValueError: a pattern names no matrix that the adapter trains; both ``every`` and ``steps``, or numbers below 1.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
        >>> adapter = svdpeft.attach(model, svdpeft.PiSSA(rank=2), ["0"])
        >>> tracker = DriftTracker(adapter)
        >>> tracker.record(0)
        >>> adapter.site("0").factors.L.data.mul_(2)[0].shape
        torch.Size([2])
        >>> tracker.record(1)
        >>> [row["delta_sigma"] > 0.1 for row in tracker.table]
        [False, True]

    Source: SORSA, arXiv:2409.00055 (ΔΣ and ΔD by index); see ``svdpeft.analysis.drift`` for the rest.
    """

    def __init__(
        self,
        adapter: Adapter,
        sites: Patterns = "all",
        every: int | None = None,
        steps: Iterable[int] = (),
        rank: int | None = None,
    ) -> None:
        self.adapter, self.every, self.steps, self.rank = adapter, every, frozenset(steps), rank
        if every is not None and self.steps:
            raise ValueError(f"every={every} and steps={sorted(self.steps)}: only one of them says when to record")
        for word, value in (("every", every), ("rank", rank)):
            if value is not None and value < 1:
                raise ValueError(f"{word}={value} is not positive")
        self.matrices = matrices_of(adapter, sites, "sites")
        self.table: list[tables.Row] = []
        self.seconds = 0.0
        self._starts: dict[str, SVD] = {}  # of the base, in host memory

    # -- when -----------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.table = []
        self._at(state, True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step
        self._at(state, step in self.steps or (self.every is not None and step % self.every == 0))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._at(state, not self.table or self.table[-1]["step"] != state.global_step)

    def _at(self, state: TrainerState, wanted: bool) -> None:
        if wanted and state.is_world_process_zero:
            self.record(state.global_step)

    # -- what -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def record(self, step: int) -> None:
        """Add one row per site to ``table``, of the weights as they are now.

        Args:
            step: how many optimizer steps there were.

        Raises:
            RuntimeError: the adapter is switched off or detached.
        """
        if self.adapter.state in ("disabled", "detached"):
            raise RuntimeError(f"adapter {self.adapter.name!r} is {self.adapter.state}: its weights cannot be read now")
        began = time.perf_counter()
        found: dict[str, tables.Row] = {}
        for group in self._groups():
            for matrix, values in zip(group, self._measure(group), strict=True):
                found[matrix.name] = {"step": step, "site": matrix.name, **values}
        self.table += [found[matrix.name] for matrix in self.matrices]
        self.seconds += time.perf_counter() - began

    def _groups(self) -> Iterator[list[Matrix]]:
        """Matrices of one shape and rank together, as long as they are small; a large one alone."""
        groups: dict[Any, list[Matrix]] = {}
        for matrix in self.matrices:
            w = matrix.base()
            rank = self.rank or matrix.rank
            alone = matrix.name if rank is None or rank >= min(w.shape[-2:]) else ""  # its spectrum says which rank
            key = (w.shape, w.dtype, w.device, rank, alone)
            groups.setdefault(key, []).append(matrix)
            if len(groups[key]) * w.numel() >= TOGETHER:
                yield groups.pop(key)
        yield from groups.values()

    def _measure(self, group: Sequence[Matrix]) -> list[dict[str, float | None]]:
        base = torch.stack([matrix.base() for matrix in group])
        change = torch.stack([_change(matrix).to(base) for matrix in group])
        start = self._start(group, base)
        known = torch.isfinite(base + change).flatten(1).all(-1)
        change = torch.where(known.reshape(-1, *[1] * (change.ndim - 1)), change, 0.0)  # a training that blew up
        with uncached():
            now = decompose(base + change, group[0].name) if change.any() else start
        values = change_of(start, now, change, self._rank(group[0], start))
        rows = []
        for i, matrix in enumerate(group):
            own = {name: value[i] for name, value in values.items()}
            own |= factors_of(matrix.site)
            rows.append(numbers(own) if known[i] else dict.fromkeys(own))
        return rows

    def _start(self, group: Sequence[Matrix], base: Tensor) -> SVD:
        if group[0].name not in self._starts:
            for w, matrix in zip(base, group, strict=True):
                check_matrix(w, matrix.name, zero=True)
            whole = decompose(base, group[0].name)
            for i, matrix in enumerate(group):
                self._starts[matrix.name] = SVD._make(t[i].cpu() for t in whole)
        kept = zip(*(self._starts[matrix.name] for matrix in group), strict=True)
        return SVD._make(torch.stack(each).to(base.device) for each in kept)

    def _rank(self, matrix: Matrix, start: SVD) -> int:
        return min(self.rank, start.s.shape[-1]) if self.rank else principal_rank(matrix.rank, start.s)

    # -- out ------------------------------------------------------------------------------------------------------

    def to_json(self, columns: Sequence[str] = COLUMNS) -> dict[str, Any]:
        """Return ``{"steps": […], "sites": […], column: [[of each site] of each step]}``, undefined ones ``None``."""
        return tables.to_columns(self.table, columns)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write ``table``, one line per step and site."""
        tables.write_csv(self.table, path)


def _change(matrix: Matrix) -> Tensor:
    assert matrix.change is not None, "every matrix of an adapter changes"
    return matrix.change()
