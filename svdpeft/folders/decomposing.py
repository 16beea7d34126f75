"""The SVDs of a model on the disk, computed once: ``attach`` finds them in the cache afterwards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from svdpeft.adapter.ambient import ordinary
from svdpeft.adapter.building import given
from svdpeft.bars import bar
from svdpeft.decomposition import svd_cache
from svdpeft.folders.folder import Folder
from svdpeft.folders.skeleton import Skeleton
from svdpeft.methods.pissa import PiSSA
from svdpeft.targets.rules import default_targets
from svdpeft.targets.select import select


@dataclass(frozen=True)
class Decomposed:
    """What ``decompose`` has done.

    Args:
        sites: that were looked at.
        computed: those that were not in the cache.
    """

    sites: tuple[str, ...]
    computed: tuple[str, ...]

    def __str__(self) -> str:
        return f"{len(self.sites)} sites: {len(self.computed)} decomposed, the others were there"


@ordinary()
@torch.no_grad()
def decompose(
    folder: str | os.PathLike[str],
    rank: int,
    cache: str | os.PathLike[str],
    targets: str | Sequence[str] | None = None,
    seed: int = 0,
) -> Decomposed:
    """Fill a cache with the SVDs of a model on the disk, in the memory of one weight; what is there is not repeated.

    Within ``svd_cache(cache)`` every method that starts from the leading triplets, ``attach(model, PiSSA(rank))`` say,
    then reads them, where the model is on the CPU and its weights are the folder's, in their own dtype or in float32.

    Args:
        folder: of the model.
        rank: that ``attach`` will be given; of a small matrix at most its own. Small weights are decomposed whole and
            serve every rank, large ones serve this one.
        cache: folder of the cache, made if need be.
        targets: as ``attach`` takes them.
        seed: that ``attach`` will be given.

    Returns:
        The sites.

    Raises:
        ValueError: no such model, no such targets, a weight that is all zero or not finite.
        OSError: the cache cannot be written, or the disk is full.

    Example:
        >>> decompose("llama-70b", rank=16, cache="svd")  # doctest: +SKIP
        Decomposed(sites=('model.layers.0.self_attn.q_proj', …), computed=(…))
    """
    skeleton = Skeleton(Folder(folder))
    method = PiSSA(rank=rank)
    named = default_targets(skeleton.model) if targets is None else targets
    patterns = [named] if isinstance(named, str) else named
    choices = select(skeleton.model, [(pattern, method) for pattern in patterns], (), ()).choices
    computed = []
    with svd_cache(cache, required=True) as kept:
        for choice in bar(choices, what="decompose", unit="site"):
            before = _count(kept)
            site = given(choice, seed, {}, skeleton.record)
            (at,) = method.resolve([site], clip=True)
            at.factors(site)
            if _count(kept) > before:
                computed.append(choice.name)
    return Decomposed(tuple(choice.name for choice in choices), tuple(computed))


def _count(folder: Path) -> int:
    return sum(file.suffix == ".safetensors" for file in folder.iterdir())
