"""All that is measured of one site, or of several of one shape: the columns of every table of this package."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from svdpeft.analysis.drift import drift, intruders, subspace_drift, update_overlap
from svdpeft.analysis.spectra import condition_number, effective_rank, energy, energy_rank, stable_rank
from svdpeft.decomposition import SVD
from svdpeft.decomposition.orthonormality import noise, orthonormality_error
from svdpeft.methods.base import Factored
from svdpeft.sites.site import Site

DRIFT = ("delta_sigma", "delta_d", "delta_sigma_assigned", "delta_d_assigned", "delta_subspace", "distance")
SHAPE = ("condition_principal", "effective_rank", "stable_rank", "energy", "intruders")
UPDATE = ("overlap_left", "overlap_right", "amplification")
FACTORS = ("condition_factors", "orthonormality")
COLUMNS = DRIFT + SHAPE + UPDATE + FACTORS
LARGEST = ("condition", "condition_principal", "condition_factors", "sigma_max", "energy_rank")

Values = dict[str, Tensor]


def change_of(start: SVD, now: SVD, change: Tensor, rank: int) -> Values:
    """Compare W' = W + ΔW with W.

    Args:
        start: the whole thin SVD of W.
        now: of W'.
        change: ΔW, (*b, m, n).
        rank: r of the principal part, of the leading subspace and of what of ΔW is laid against it.

    Returns:
        The columns of ``DRIFT``, ``SHAPE`` and ``UPDATE``, each (*b,).
    """
    moved, lies = drift(start, now), update_overlap(start, change, rank)
    size = torch.linalg.vector_norm(start.s, dim=-1)
    return {
        "delta_sigma": moved.delta_sigma,
        "delta_d": moved.delta_d,
        "delta_sigma_assigned": moved.delta_sigma_assigned,
        "delta_d_assigned": moved.delta_d_assigned,
        "delta_subspace": subspace_drift(start, now, rank),
        "distance": torch.linalg.matrix_norm(change) / size,
        "condition_principal": condition_number(now.s, rank),
        "effective_rank": effective_rank(now.s),
        "stable_rank": stable_rank(now.s),
        "energy": energy(now.s)[..., rank - 1],
        "intruders": intruders(start, now).to(now.s.dtype),
        "overlap_left": lies.left,
        "overlap_right": lies.right,
        "amplification": lies.amplification,
    }


def principal_rank(rank: int | None, s: Tensor) -> int:
    """Return the rank of a method, or where that says nothing (none, or all of K) what keeps 90 % of W0's energy."""
    return rank if rank is not None and rank < s.shape[-1] else max(int(energy_rank(s).max()), 1)


def spectrum_of(s: Tensor, share: float) -> Values:
    """Describe one weight by its singular values, (*b, K): each column (*b,)."""
    return {
        "sigma_max": s[..., 0],
        "condition": condition_number(s),
        "effective_rank": effective_rank(s),
        "stable_rank": stable_rank(s),
        "energy_rank": energy_rank(s, share).to(s.dtype),
    }


def factors_of(site: Site | None) -> Values:
    """Return κ(s L C A) and the orthonormality error of a site's bases; NaN where there is no such thing.

    The condition number is σ_1 / σ_r of what the factors hold: for SORSA and PiSSA the principal part of the weight,
    for LoRA the update. The error is ‖LᵀL − I‖_F + ‖AAᵀ − I‖_F over those of L and A that train and started
    orthonormal.
    """
    nan = torch.full((1,), torch.nan)
    if site is None or not isinstance(site.method, Factored):
        return dict.fromkeys(FACTORS, nan)
    method, f = site.method, site.factors
    product = method.now(f)
    wide = product.to(torch.promote_types(product.L.dtype, torch.float32))
    core = torch.linalg.qr(wide.cored()).R @ torch.linalg.qr(wide.A.mT).R.mT
    finite = bool(torch.isfinite(core).all())
    condition = condition_number(torch.linalg.svdvals(core)) if finite else nan
    errors = []
    for name in {"L", "A"} & set(method.trains) & f._parameters.keys():
        now, then = getattr(f, name).detach(), f.started(name).detach()
        now, then = (now, then) if name == "L" else (now.mT, then.mT)
        if (orthonormality_error(then.float()) <= noise(then)).all():
            errors.append(orthonormality_error(now.to(wide.L.dtype)))
    return {"condition_factors": condition, "orthonormality": torch.stack(errors).sum(0) if errors else nan}


def numbers(values: Mapping[str, Tensor]) -> dict[str, float | None]:
    """One number per column, the largest or the mean of a site's matrices; ``None`` where it is undefined."""
    found = {}
    for name, value in values.items():
        value = value.double().flatten()
        known = value[~value.isnan()]
        number = math.nan if not len(known) else float(known.max() if name in LARGEST else known.mean())
        found[name] = float(f"{number:.7g}") if math.isfinite(number) else None
    return found
