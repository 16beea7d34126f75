"""Adapters merged into a model that stays on the disk: tensor by tensor, from one folder into another.

    W' = round(W0 + Σᵢ wᵢ ΔWᵢ), formed in float32, of float64 in float64, and rounded once

The model is built without its weights, so that its names, layers and shapes are known; each tensor is then read,
changed and written before the next.
"""

from __future__ import annotations

import functools
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from svdpeft.adapter.ambient import ordinary
from svdpeft.adapter.checking import check_weight, warn_of_precision
from svdpeft.atomic import replacing
from svdpeft.bars import bar
from svdpeft.decomposition import all_finite
from svdpeft.folders import output
from svdpeft.folders.changes import Change, Update, changes
from svdpeft.folders.folder import WORDS, Folder
from svdpeft.folders.rounding import stochastic
from svdpeft.folders.skeleton import Skeleton
from svdpeft.methods.base import generator
from svdpeft.sites.weights import MergeReport, RoundedSum

Name = str | os.PathLike[str]


@ordinary()
@torch.no_grad()
def merge(
    base: Name,
    adapters: Name | Sequence[Name | tuple[Name, float]],
    out: Name,
    *,
    dtype: torch.dtype | None = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    shard_size: int | str | None = None,
    check_base: bool = True,
) -> MergeReport:
    """Merge adapters into a model on the disk, in the memory of its largest tensor and of the adapters.

        W' = round(W0 + Σᵢ wᵢ ΔWᵢ)

    Args:
        base: folder of the model: ``config.json`` with ``model.safetensors`` or its shards, as transformers and timm
            write it.
        adapters: folder of an adapter, or several, each alone or with its weight wᵢ, which is 1 where none is given.
            What an adapter has trained whole becomes W0 + Σ wᵢ (Wᵢ − W0), and so do running statistics.
        out: new folder, which loads as the base does; other files than weights are copied. It is there whole or not at
            all.
        dtype: of the new floating-point tensors; ``None``: each keeps its own.
        stochastic_rounding: to bfloat16 and float16 round up or down at random, so that what is lost is zero on
            average, and not to the nearest.
        seed: of that; each tensor's own depends on this and on its name.
        shard_size: of a file, in bytes or as ``"2GB"``; ``None``: the files of the base.
        check_base: refuse a base whose adapted weights differ in a single bit from the adapters' own; the same weights
            in another precision are taken with a warning.

    Returns:
        The share of each site's update that was lost in rounding; where a weight has several, of all its update.

    Raises:
        ValueError: no such model; a tensor that the folder has under another name than the model, or that would not be
            finite; a weight that another layer has, too, or that one adapter adapts and another trains whole.
        CheckpointError: an adapter that is damaged, or was made for another base.
        FileExistsError: ``out`` exists.

    Example:
        >>> merge("llama", [("math", 0.7), ("code", 0.3)], "llama-both", dtype=torch.bfloat16)  # doctest: +SKIP
        MergeReport(lost={'model.layers.0.self_attn.q_proj': 0.0021, …})
    """
    out = Path(out)
    output.check_new(out)
    if dtype is not None and dtype not in WORDS:
        raise ValueError(f"dtype {dtype} is none of {', '.join(map(str, WORDS))}")
    skeleton = Skeleton(Folder(base))
    changed = changes(skeleton, _weighted(adapters))
    entries = output.entries(skeleton, dtype, shard_size)
    others: dict[Path, list[tuple[str, str, str]]] = {}  # adapters of a base in another precision
    lost: dict[str, float] = {}
    progress = bar(total=len(entries), what="merge", unit="tensor")

    def value(name: str) -> Iterator[Tensor]:
        progress.update()
        w, change = skeleton.read(name), changed.get(name, Change())
        checks = [beside.submit(checked, update, str(w.dtype)) for update in change.updates]
        to = dtype if dtype is not None and w.dtype in WORDS else w.dtype
        if name not in changed and to == w.dtype:
            yield w
            return
        rounding = None
        if stochastic_rounding and to.is_floating_point:
            draws = generator(zlib.crc32(f"{seed}/{name}".encode()))
            rounding = functools.partial(stochastic, dtype=to, generator=draws)
        if not change.updates:
            exact = change.of(w)
            made = rounding(exact) if rounding else (exact if to.is_floating_point else exact.round()).to(to)
            _check_finite(name, w, lambda: exact, made)
            yield made
            return
        sums = RoundedSum(to, rounding)
        for rows, added in change.added(torch.promote_types(w.dtype, torch.float32)):
            made = sums.of(w[rows], added)
            _check_finite(name, w[rows], functools.partial(torch.add, w[rows], added), made)
            yield made
        lost.update(dict.fromkeys((update.site.name for update in change.updates), sums.lost))
        for check in checks:  # of a base that it is not for nothing is left
            check.result()

    def checked(update: Update, dtype: str) -> None:
        site, entry = update.site, update.entry
        if check_weight(site.name, entry, site.weight, update.path, check_base, update.free):
            others.setdefault(update.path, []).append((site.name, entry["dtype"], dtype))

    # A digest takes a fifth of the time, and one thread.
    with progress, ThreadPoolExecutor(1) as beside, replacing(out) as new:
        output.write(skeleton, new, entries, value, dtype)
    for path, found in others.items():
        warn_of_precision(path, found, stacklevel=5)
    return MergeReport(lost)


def _weighted(adapters: Name | Sequence[Name | tuple[Name, float]]) -> list[tuple[Path, float]]:
    given = [adapters] if isinstance(adapters, (str, os.PathLike)) else adapters
    pairs = [each if isinstance(each, tuple) else (each, 1.0) for each in given]
    if not pairs:
        raise ValueError("merge() needs at least one adapter")
    for path, weight in pairs:
        if not math.isfinite(weight):
            raise ValueError(f"the weight {weight} of adapter {path} is not finite")
    return [(Path(path), weight) for path, weight in pairs]


def _check_finite(name: str, w: Tensor, exact: Callable[[], Tensor], made: Tensor) -> None:
    """Refuse what was finite and would no longer be."""
    if not all_finite(made) and (w.isfinite() & ~made.isfinite()).any():
        why = f"it overflows {made.dtype}" if exact().isfinite().all() else "the training has diverged"
        raise ValueError(f"{name} would not be finite: {why}")
