"""Spectral analysis of weights and of training: ΔΣ and ΔD, ranks, intruder dimensions, and pictures of them."""

from __future__ import annotations

from typing import Any

from svdpeft.analysis.drift import Drift, Overlap, assign, drift, intruders, subspace_drift, update_overlap
from svdpeft.analysis.inspection import Inspection, inspect
from svdpeft.analysis.measures import COLUMNS
from svdpeft.analysis.plots import plot_course, plot_drift, plot_energy, plot_spectrum
from svdpeft.analysis.spectra import condition_number, effective_rank, energy, energy_rank, stable_rank

__all__ = [
    "COLUMNS",
    "Drift",
    "Inspection",
    "Overlap",
    "assign",
    "condition_number",
    "drift",
    "effective_rank",
    "energy",
    "energy_rank",
    "inspect",
    "intruders",
    "plot_course",
    "plot_drift",
    "plot_energy",
    "plot_spectrum",
    "stable_rank",
    "subspace_drift",
    "update_overlap",
]


def __getattr__(name: str) -> Any:
    if name == "DriftTracker":  # a callback of transformers, which is not imported for a picture
        from svdpeft.analysis.tracker import DriftTracker

        return DriftTracker
    raise AttributeError(f"module 'svdpeft.analysis' has no attribute {name!r}")
