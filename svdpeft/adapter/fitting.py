"""Whether what was saved for a site makes an update of its weight: found out without computing one."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from svdpeft.adapter.file import TENSORS, CheckpointError
from svdpeft.methods.base import Factors, PerSite


def fitted(
    site: str,
    method: PerSite,
    own: Mapping[str, Tensor],
    tied: dict[str, Tensor],
    shape: torch.Size,
    path: Path,
    known: set[Hashable],
) -> Factors:
    """Return the factors of a site.

    Args:
        site: of the adapter.
        method: of the site.
        own: its tensors.
        tied: those that it shares with others.
        shape: (*b, m, n) of the weight's matrices.
        path: of the adapter, for messages.
        known: what was found to fit, to which this is added: a model has many layers that are alike.

    Raises:
        CheckpointError: they make no update of that shape.
    """
    *batch, m, n = shape
    if any(isinstance(getattr(method, name), Mapping) for name in method.resolved) or method.at(site, m, n) != method:
        raise CheckpointError(f"the header of {path}: {method} at {site} says a rank of other sites as well")
    of = math.prod(batch), m, n
    alike = json.dumps(method.to_json(), sort_keys=True), shape, _looks(own), _looks(tied)
    if alike not in known:
        _check_fit(site, method, Factors(_shapes(own), method.trains, _shapes(tied), of), shape, path)
        known.add(alike)
    factors = Factors(own, method.trains, tied, of)
    _check_indices(site, method, factors, shape, path)
    return factors


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same without values, of which a check of shapes computes nothing."""
    there = {role: t.detach().to("meta") for role, t in tensors.items()}
    return {r: nn.Parameter(t) if isinstance(tensors[r], nn.Parameter) else t for r, t in there.items()}


def _looks(tensors: Mapping[str, Tensor]) -> Hashable:
    """What ``_shapes`` keeps of tensors."""
    return tuple((role, t.shape, t.dtype, isinstance(t, nn.Parameter)) for role, t in tensors.items())


@torch.no_grad()
def _check_fit(site: str, method: PerSite, factors: Factors, shape: torch.Size, path: Path) -> None:
    """Refuse at load what would otherwise fail in the first forward: factors that do not make an m×n update."""
    *batch, m, n = shape
    for name in method.tensor_names():
        if name not in factors._parameters:
            raise CheckpointError(f"{path / TENSORS}: tensor {site}/{name} is missing, or not of floating point")
    try:
        product = method.product(factors, folded=True)  # L, C and A as they are
        if product is None:
            weight = torch.zeros(shape, dtype=next(factors.parameters()).dtype, device="meta")
            if (found := method.delta(factors, weight).shape) != shape:
                raise CheckpointError(f"{path / TENSORS}: the tensors of {site} make {list(found)} of a {m}x{n} weight")
            return
        if not abs(product.scale) <= torch.finfo(product.L.dtype).max:
            raise CheckpointError(f"the header of {path}: {site} has the scale {product.scale:g}, which is no number")
        for role, tensor, want in (("L", product.L, [*batch, m]), ("A", product.A.mT, [*batch, n])):
            if list(tensor.shape[:-1]) != want:
                raise CheckpointError(f"{path / TENSORS}: {site}/{role} does not fit the {m}x{n} weight of {site}")
        update = method.product(factors)
        assert update is not None
        update._replace(L=update.L[..., :1, :], A=update.A[..., :1]).dense()  # one entry: do the ranks agree?
    except (AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path / TENSORS}: the factors of {site} make no {m}x{n} update: {error}") from error


@torch.no_grad()
def _check_indices(site: str, method: PerSite, factors: Factors, shape: torch.Size, path: Path) -> None:
    """Refuse integers, which say what goes where, that point at nothing: shapes alone do not tell."""
    tensors = factors.tensors()
    whole = [role for role, t in tensors.items() if not t.is_floating_point()]
    if not whole:
        return
    try:
        if method.product(factors) is None:  # of now and of the start
            method.delta(factors, torch.zeros(shape, dtype=next(factors.parameters()).dtype))
    except (RuntimeError, IndexError) as error:
        told = f"{path / TENSORS}: {', '.join(whole)} of {site} points beyond its factors or its weight: {error}"
        raise CheckpointError(told) from error
