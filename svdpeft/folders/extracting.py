"""The adapter that is the difference of two models on the disk: a LoRA of what a full fine-tuning has changed.

    W1 − W0 ≈ L A        the r leading singular triplets, L = U √Σ, A = √Σ Vᵀ

Source: Eckart & Young 1936: no product of rank r is nearer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from svdpeft.adapter.ambient import ordinary
from svdpeft.adapter.attach import check_name, site_of
from svdpeft.adapter.file import check_ours
from svdpeft.adapter.saving import Contents, save
from svdpeft.bars import bar
from svdpeft.decomposition import SVD, truncated_svd
from svdpeft.folders.folder import Folder
from svdpeft.folders.skeleton import Skeleton
from svdpeft.methods.base import Factors
from svdpeft.methods.lora import LoRA
from svdpeft.registry import near_miss
from svdpeft.sites.normalisation import running_statistics
from svdpeft.sites.site import Site
from svdpeft.sites.weights import stored
from svdpeft.targets.choice import Choice
from svdpeft.targets.inventory import users_of_parameters
from svdpeft.targets.rules import rules
from svdpeft.targets.select import select


@dataclass(frozen=True)
class Extracted:
    """What ``extract`` has written.

    Args:
        ranks: of each site.
        errors: per site ‖W1 − W0 − L A‖_F / ‖W1 − W0‖_F.
        whole: what differs and is no target: the adapter holds it whole.
    """

    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    whole: tuple[str, ...]

    def __str__(self) -> str:
        whole = f", {len(self.whole)} whole" if self.whole else ""
        if not self.ranks:
            return f"no sites{whole}"
        where = max(self.errors, key=lambda name: self.errors[name])
        ranks = sorted({min(self.ranks.values()), max(self.ranks.values())})
        return (
            f"{len(self.ranks)} sites of rank {' to '.join(map(str, ranks))}{whole}; the adapter lacks at most "
            f"{self.errors[where]:.2%} of a difference, at {where}"
        )


@ordinary()
@torch.no_grad()
def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: str | Sequence[str] = "all-linear",
    name: str = "default",
) -> Extracted:
    """Write an adapter of what distinguishes two models on the disk, in the memory of a tensor and of the adapter.

    Args:
        base: folder of a model, W0.
        tuned: folder of the same model with other values, W1.
        out: folder of the new adapter, which ``svdpeft.load`` takes onto the base.
        rank: of every site; of a small matrix at most its own.
        energy: instead of a rank: the smallest at which ‖L A‖² is this share, in (0, 1], of ‖W1 − W0‖² at a site.
        targets: what becomes a product, as ``attach`` takes it. All else that differs (norms, biases, an output layer)
            is held whole, and what does not differ is not held.
        name: of the adapter.

    Returns:
        Rank and error of every site.

    Raises:
        ValueError: folders that are no models, or of different shapes; ones that do not differ; neither or both of
            ``rank`` and ``energy``; a name that no adapter can have; parts of a weight, or one user of a tied one, as
            targets, where more differs.
        FileExistsError: ``out`` is a file, or has files that svdpeft has not written.

    Example:
        >>> extract("llama", "llama-tuned", "difference", energy=0.9)  # doctest: +SKIP
        Extracted(ranks={'model.layers.0.self_attn.q_proj': 41, …})
    """
    if (rank is None) == (energy is None):
        raise ValueError("give one of rank and energy")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy {energy} is outside (0, 1]")
    check_name(name)
    check_ours(Path(out))
    here, there = Skeleton(Folder(base)), Folder(tuned)
    _check_same(here.folder, there)
    rule = rules(targets, LoRA(rank=1 if rank is None else rank))
    choices = select(here.model, [(pattern, method) for pattern, method in rule if isinstance(method, LoRA)], (), ())
    groups: dict[int, list[Choice]] = {}  # by the identity of their weight: the parts of one are several
    for choice in choices.choices:
        groups.setdefault(id(stored(choice.places[0].module, choice.places[0].parameter)), []).append(choice)
    parameters, tensors = dict(here.model.named_parameters()), here.tensors()
    own = {id(p): n for n, p in parameters.items()}  # and under which name an adapter holds it whole
    own |= {id(stored(*place)): n for n, place in running_statistics(here.model).items()}
    sites, errors, values = dict[str, Site](), dict[str, float](), dict[str, Tensor]()
    done: set[int] = set()  # a tied tensor has several names
    for key in bar(here.folder.entries, what="extract", unit="tensor"):
        tensor = id(tensors.get(key))
        w0, w1 = here.read(key), there.tensor(key)
        wide = torch.promote_types(w0.dtype, w1.dtype)
        if tensor in done or torch.equal(w0.to(wide), w1.to(wide)):
            continue
        done.add(tensor)
        if tensor in groups:
            for site, error in _sites(here, groups[tensor], w0, w1, rank, energy):
                sites[site.name], errors[site.name] = site, error
        elif tensor in own:
            values[own[tensor]] = w1
        else:
            raise ValueError(
                f"{key} differs, and no adapter holds it: in the model it has another name, or is neither a parameter "
                "nor a running statistic"
            )
    if not done:
        raise ValueError(f"{tuned} has the weights of {base}: there is no difference to extract")
    whole = [n for n in values if n in parameters]
    pairs = [(site.name, site.method) for site in sites.values()]
    save(Contents(name, here.model, pairs, sites, whole, values, choices.skipped, "train"), out, "stored")
    return Extracted({site.name: site.factors.L.shape[-1] for site in sites.values()}, errors, tuple(values))


def _sites(
    here: Skeleton, choices: Sequence[Choice], w0: Tensor, w1: Tensor, rank: int | None, energy: float | None
) -> Iterator[tuple[Site, float]]:
    """The sites of one weight that differs, each with its error."""
    wide = torch.promote_types(torch.promote_types(w0.dtype, w1.dtype), torch.float32)
    difference = w1.to(wide, copy=True).sub_(w0)
    first = choices[0].places[0]
    users = users_of_parameters(here.model)[id(stored(first.module, first.parameter))]
    if len(choices[0].places) < len(users):
        layers = " and ".join(layer for layer, _ in users)
        raise ValueError(f"{choices[0].name} differs, and its weight is that of {layers}: name all of them")
    record, rest = here.record(first.module, first.parameter), difference.clone() if choices[0].part else None
    for choice in choices:
        kind, module = choice.places[0].kind, choice.places[0].module
        d = kind.to_matrix(module, difference)
        if rest is not None:
            rest -= kind.from_matrix(module, d)
        size = torch.linalg.vector_norm(d)
        if size == 0:
            continue
        left, right = _leading(d, rank, energy, choice.name).balanced()
        method = LoRA(rank=left.shape[-1])
        shape = (d[..., 0, 0].numel(), d.shape[-2], d.shape[-1])
        site = site_of(choice, method, Factors({"L": left, "A": right}, method.trains, shape=shape), record)
        yield site, float(torch.linalg.vector_norm(site.matrix().sub_(d)) / size)
    if rest is not None and rest.any():
        weight, parts = choices[0].name.partition("[")[0], ", ".join(choice.part for choice in choices)
        raise ValueError(f"{weight} differs outside of its part {parts}, which targets= names: name the whole of it")


def _leading(d: Tensor, rank: int | None, energy: float | None, where: str) -> SVD:
    """The leading triplets of a difference, of a rank or of a share of its energy."""
    full = min(d.shape[-2:])
    if energy is None:
        assert rank is not None, "one of the two is given"
        return truncated_svd(d, min(rank, full), where=where)
    wanted = energy * float(torch.linalg.vector_norm(d, dtype=torch.float64)) ** 2
    wanted *= 1 - 64 * torch.finfo(d.dtype).eps  # up to rounding, or all of it would be every rank
    tried = 4
    while True:
        tried = min(4 * tried, full)
        found = truncated_svd(d, tried, where=where)
        kept = found.s.double().square().reshape(-1, tried).sum(0).cumsum(0)
        r = int((kept < wanted).sum()) + 1
        if r <= tried or tried == full:
            r = min(r, full)
            return SVD(found.u[..., :r], found.s[..., :r], found.vh[..., :r, :])


def _check_same(here: Folder, there: Folder) -> None:
    """Refuse models of which one has what the other has not."""
    for one, other in ((here, there), (there, here)):
        for name, entry in one.entries.items():
            if name not in other.entries:
                raise ValueError(f"{one.path} has {name}, and {other.path} does not: {near_miss(name, other.entries)}")
            if (shape := other.entries[name].shape) != entry.shape:
                raise ValueError(f"{name} is {list(entry.shape)} in {one.path}, {list(shape)} in {other.path}")
