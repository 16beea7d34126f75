"""Pictures of spectra and of their drift, one call each; the numbers behind a picture lie beside it as CSV.

Every function takes ``path`` (``drift.png``; ``.svg`` and ``.pdf`` work too) and writes ``drift.csv`` as well.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from svdpeft.analysis.inspection import Inspection
from svdpeft.analysis.spectra import energy as energy_of
from svdpeft.analysis.spectra import energy_rank
from svdpeft.analysis.tables import Row, Table, check_file, to_rows, write_csv
from svdpeft.atomic import replacing
from svdpeft.registry import near_miss

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito 2008: told apart with every kind of colour vision. Beyond seven the style of the line changes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
POINTS = 201  # of a curve over r / K
COURSES = {  # what the columns of a tracker are called on an axis
    "delta_sigma": "ΔΣ: mean change of the singular values",
    "delta_d": "ΔD: mean turn of the singular vectors",
    "delta_sigma_assigned": "ΔΣ, matched by assignment",
    "delta_d_assigned": "ΔD, matched by assignment",
    "delta_subspace": "what has left the r leading directions",
    "distance": "‖ΔW‖ / ‖W0‖",
    "condition_principal": "σ₁ / σᵣ of the leading r triplets of W'",
    "effective_rank": "effective rank of W'",
    "stable_rank": "stable rank of W'",
    "energy": "share of ‖W'‖² in its r leading triplets",
    "intruders": "intruders among the 10 leading vectors of W'",
    "overlap_left": "overlap of ΔW with the leading left vectors of W0",
    "overlap_right": "overlap of ΔW with the leading right vectors of W0",
    "amplification": "amplification of ΔW's directions",
    "condition_factors": "σ₁ / σᵣ of the factors, s L C A",
    "orthonormality": "‖LᵀL − I‖ + ‖AAᵀ − I‖",
}


def plot_drift(table: Table | Mapping[str, Table], path: str | os.PathLike[str]) -> None:
    """Draw ΔD against ΔΣ along training, from (0, 0): a thin line per site, a thick one for the mean over sites.

    Left matched by index, as in the SORSA paper, right by assignment. One colour per type of layer, or per run.

    Args:
        table: of a ``DriftTracker`` (``.table`` or ``.to_json()``), or several by the name of their run.
        path: of the picture.

    Source: SORSA, arXiv:2409.00055.
    """
    panels = {"delta_d": "matched by index (as in SORSA)", "delta_d_assigned": "matched by assignment"}
    rows, by = _runs(table)
    with _picture(path, rows, ("run", "site", "step", "delta_sigma", *panels), panels=len(panels)) as every:
        for axes, (column, title) in zip(every, panels.items(), strict=True):
            for name, look, lines in _lines(rows, by, ("delta_sigma", column)):
                for line in lines:
                    axes.plot(*zip((0.0, 0.0), *line, strict=True), **look, linewidth=0.7, alpha=0.3)
                mean = [tuple(map(_mean, zip(*points, strict=True))) for points in zip(*lines, strict=True)]
                axes.plot(
                    *zip((0.0, 0.0), *mean, strict=True),
                    **look,
                    linewidth=2.4,
                    zorder=3,
                    marker="o",
                    markersize=4,
                    label=name,
                )
            axes.set(title=title, xlabel=COURSES["delta_sigma"])
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
        every[0].set_ylabel(COURSES["delta_d"])


def plot_course(
    table: Table | Mapping[str, Table], path: str | os.PathLike[str], column: str = "condition_principal"
) -> None:
    """Draw one column of a tracker over the steps of a training: thin lines are sites, thick ones their mean.

    Args:
        table: as for ``plot_drift``.
        path: of the picture.
        column: of the table: ``"condition_principal"``, ``"condition_factors"`` (their mean is the geometric one),
            ``"orthonormality"``, ``"effective_rank"``, ``"intruders"``, ``"overlap_left"``, …

    Raises:
        ValueError: no such column; the near miss is named.
    """
    if column not in COURSES:
        raise ValueError(f"no column is called {column!r}: {near_miss(column, COURSES)}")
    rows, by = _runs(table)
    middle = _geometric if column.startswith("condition") else _mean
    with _picture(path, rows, ("run", "site", "step", column)) as (axes,):
        for name, look, lines in _lines(rows, by, ("step", column)):
            for line in lines:
                axes.plot(*zip(*line, strict=True), **look, linewidth=0.7, alpha=0.3)
            mean = [(points[0][0], middle([y for _, y in points])) for points in zip(*lines, strict=True)]
            axes.plot(*zip(*mean, strict=True), **look, linewidth=2.4, zorder=3, marker="o", markersize=4, label=name)
        axes.set(xlabel="optimizer step", ylabel=COURSES[column])
        known = [row[column] for row in rows if row[column] is not None]
        if known and max(known) > 30 * min(known) > 0:
            axes.set_yscale("log")


def plot_energy(found: Inspection | Mapping[str, Tensor], path: str | os.PathLike[str], energy: float = 0.9) -> None:
    """Draw the share of ‖W‖_F² that each rank keeps: thin lines are sites, thick ones the mean of a type of layer.

    Args:
        found: of ``inspect``, or singular values by site, (…, K).
        path: of the picture.
        energy: a share to mark; the legend says the median rank that keeps it.
    """
    spectra = _spectra(found)
    rows = [
        {"site": site, "rank": i + 1, "rank_share": (i + 1) / s.shape[-1], "energy": float(f"{y:.7g}")}
        for site, s in spectra.items()
        for i, y in enumerate(_averaged(energy_of(s)))
    ]
    with _picture(path, rows, ("site", "rank", "rank_share", "energy")) as (axes,):
        for name, look, sites in _types(spectra):
            ranks = [float(energy_rank(spectra[site], energy).max()) / spectra[site].shape[-1] for site in sites]
            curves = [_resampled([0.0, *_averaged(energy_of(spectra[site]))]) for site in sites]
            _curves(axes, curves, look, f"{name}: {100 * _median(ranks):.0f} % of K", 100.0)
        axes.axhline(100 * energy, color="#666666", linewidth=1, linestyle=(0, (4, 3)))
        axes.set(xlabel="rank r, in % of K = min(m, n)", ylabel="energy kept, Σσ² of the r leading triplets, in %")
        axes.set(xlim=(0, 100), ylim=(0, 101))
        axes.legend(title=f"median rank for {100 * energy:g} %", loc="lower right", framealpha=0.9)


def plot_spectrum(found: Inspection | Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Draw the singular values: thin lines are sites, thick ones the mean of the logarithms of a type of layer.

    Args:
        found: of ``inspect``, or singular values by site, (…, K).
        path: of the picture.
    """
    spectra = {site: _root_mean_square(s) for site, s in _spectra(found).items()}
    rows = [
        {"site": site, "index": i + 1, "sigma": float(f"{y:.7g}")}
        for site, s in spectra.items()
        for i, y in enumerate(s)
    ]
    with _picture(path, rows, ("site", "index", "sigma")) as (axes,):
        for name, look, sites in _types(spectra):
            logs = [_resampled([math.log10(y) if y > 0 else math.nan for y in spectra[site]]) for site in sites]
            _curves(axes, logs, look, name, 1.0, power=True)
        axes.set(yscale="log", xlim=(0, 100), xlabel="index i, in % of K = min(m, n)", ylabel="singular value σᵢ")


# -- what the pictures share --------------------------------------------------------------------------------------


def check_picture(path: str | os.PathLike[str]) -> Path:
    """Refuse a picture that cannot be drawn before the work whose result it is to show.

    Raises:
        ValueError: another suffix than .png, .svg or .pdf.
        OSError: the path is a folder, or lies in none.
    """
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{path}: a picture is a .png, .svg or .pdf file")
    return check_file(path)


class _picture:
    """A figure that is saved, and its numbers beside it, when the block ends well."""

    def __init__(
        self, path: str | os.PathLike[str], rows: Sequence[Row], columns: Sequence[str], panels: int = 1
    ) -> None:
        from matplotlib.figure import Figure  # no pyplot: no global state, no display

        self.path, self.columns = check_picture(path), columns
        if not rows:
            raise ValueError(f"{self.path}: the table has no rows, so there is nothing to draw")
        self.rows = [{column: row.get(column) for column in columns} for row in rows]
        self.figure = Figure(figsize=(5.6 * panels + 0.6, 4.8), layout="constrained")
        self.axes: Sequence[Axes] = self.figure.subplots(1, panels, sharex=True, sharey=True, squeeze=False)[0]

    def __enter__(self) -> Sequence[Axes]:
        return self.axes

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None:
            return
        for axes in self.axes:
            axes.grid(alpha=0.25, which="major")
            axes.spines[["top", "right"]].set_visible(False)
        handles, labels = self.axes[0].get_legend_handles_labels()
        if labels and self.axes[0].get_legend() is None:
            self.figure.legend(handles, labels, loc="outside right upper", frameon=False)
        with replacing(self.path) as new:
            self.figure.savefig(new, dpi=150)
        write_csv(self.rows, self.path.with_suffix(".csv"))


def _runs(table: Table | Mapping[str, Table]) -> tuple[list[Row], Callable[[Row], str]]:
    """All rows, and what a row is coloured by: its run, or in a single run the type of its layer."""
    if isinstance(table, Mapping) and "steps" not in table:
        return [{"run": run, **row} for run, each in table.items() for row in to_rows(each)], lambda row: row["run"]
    return [{"run": "", **row} for row in to_rows(table)], lambda row: _type(row["site"])  # type: ignore[arg-type]


def _lines(
    rows: Sequence[Row], by: Callable[[Row], str], columns: tuple[str, str]
) -> Iterator[tuple[str, dict[str, Any], list[list[tuple[float, float]]]]]:
    """Per group its name, its look, and a line of points for each of its sites; what is undefined is NaN."""
    groups: dict[str, dict[tuple[str, str], list[tuple[float, float]]]] = {}
    for row in rows:
        x, y = (math.nan if row[column] is None else row[column] for column in columns)
        groups.setdefault(by(row), {}).setdefault((row["run"], row["site"]), []).append((x, y))
    for i, (name, lines) in enumerate(groups.items()):
        yield name, _look(i), list(lines.values())


def _types(spectra: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    groups: dict[str, list[str]] = {}
    for site in spectra:
        groups.setdefault(_type(site), []).append(site)
    for i, (name, sites) in enumerate(groups.items()):
        yield name, _look(i), sites


def _type(site: str) -> str:
    """``layers.3.attn.q_proj`` -> ``q_proj``, ``stages.1.0`` -> ``stages``: the last part that is no number."""
    parts = [part for part in site.removesuffix(".weight").split(".") if not part.isdigit()]
    return parts[-1] if parts else site


def _look(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)]}


def _curves(
    axes: Axes, curves: Sequence[Sequence[float]], look: dict[str, Any], name: str, times: float, power: bool = False
) -> None:
    def drawn(curve: Sequence[float]) -> list[float]:
        return [10**y if power else times * y for y in curve]

    x = [100 * i / (POINTS - 1) for i in range(POINTS)]
    for curve in curves if len(curves) > 1 else ():
        axes.plot(x, drawn(curve), **look, linewidth=0.7, alpha=0.3)
    axes.plot(
        x, drawn([_mean(each) for each in zip(*curves, strict=True)]), **look, linewidth=2.4, zorder=3, label=name
    )


def _spectra(found: Inspection | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return found.spectra if isinstance(found, Inspection) else found


def _averaged(curves: Tensor) -> list[float]:
    return curves.reshape(-1, curves.shape[-1]).nanmean(0).tolist()


def _root_mean_square(s: Tensor) -> list[float]:
    return s.reshape(-1, s.shape[-1]).square().mean(0).sqrt().tolist()


def _resampled(curve: Sequence[float]) -> list[float]:
    """A curve at POINTS equally spaced places, so that matrices of several sizes can be averaged."""
    found = []
    for i in range(POINTS):
        at = i * (len(curve) - 1) / (POINTS - 1)
        low = min(int(at), len(curve) - 2) if len(curve) > 1 else 0
        high = min(low + 1, len(curve) - 1)
        found.append(curve[low] + (at - low) * (curve[high] - curve[low]))
    return found


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _geometric(values: Sequence[float]) -> float:
    mean = _mean([math.log(value) for value in values if value > 0])
    return mean if math.isnan(mean) else math.exp(mean)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
