"""Comparisons that were never run, as a store would hold them: known differences, and every part that a report has."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

from svdpeft.compare.store import Store

# label, method, share of test items that are right, values in factors, milliseconds per step
METHODS = (
    ("SORSA", {"name": "sorsa", "rank": 8}, 0.935, 77_626, 126),
    ("SVFT topk", {"name": "svft", "pattern": "topk"}, 0.928, 95_722, 131),
    ("PiSSA", {"name": "pissa", "rank": 8}, 0.915, 77_578, 121),
    ("LoRA", {"name": "lora", "rank": 8}, 0.900, 77_578, 116),
    ("DoRA of PiSSA", {"name": "dora", "inner": {"name": "pissa", "rank": 4}}, 0.905, 91_010, 205),
    ("SVFT banded", {"name": "svft", "pattern": "banded"}, 0.897, 95_722, 141),
    ("SVFT plain", {"name": "svft"}, 0.840, 22_282, 130),
    ("Full", {"name": "full"}, 0.862, 0, 188),
    ("HeadOnly", {"name": "head-only"}, 0.760, 0, 43),
)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
BASE = 21_540_490


def methods(count: int) -> list[tuple[str, dict[str, Any], float, int, float]]:
    """The methods above, or as many as are asked for."""
    if count <= len(METHODS):
        return list(METHODS[:count])
    more = [
        (
            f"SORSA γ={i}e-5",
            {"name": "sorsa", "gamma": i * 1e-5},
            0.7 + 0.2 * math.sin(i) ** 2,
            30_000 + 1500 * i,
            90 + i,
        )
        for i in range(count - len(METHODS))
    ]
    return [*METHODS, *more]


def comparison(
    *,
    count: int = 9,
    seeds: int = 3,
    budgets: Sequence[str | None] = ("0.5%",),
    steps: int = 126,
    items: int = 300,
    trials: bool = True,
    spectra: bool = True,
    labels: dict[str, str] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return ``comparison.json``, the runs and the trials of a comparison.

    Args:
        count: number of methods.
        seeds: number of seeds.
        budgets: of each method.
        steps: of training, each with a loss.
        items: of the test split.
        trials: whether learning rates were searched.
        spectra: whether spectra were recorded, for the methods with factors.
        labels: other labels for some methods.
    """
    chosen = [((labels or {}).get(label, label), *rest) for label, *rest in methods(count)]
    draw = random.Random(0)
    hard = [draw.gauss(0, 1) for _ in range(items)]
    runs, tried = [], []
    for b, budget in enumerate(budgets):
        for m, (label, method, skill, factors, ms) in enumerate(chosen):
            if b and not factors:
                continue  # no budget holds it: it is run once
            best = RATES[4 if label == "LoRA" else 1 + m % 3]
            identity = {
                "model": "dinov2-vits14",
                "task": {"name": "mnist5k", "train_size": 1000, "validation_size": 500, "test_size": items},
                "method": method,
                "lr": best if trials else 1e-3,
                "head_lr": 0.01,
                "targets": ["all-linear"],
                "exclude": [],
                "budget": budget if factors else None,
                "epochs": 1.0,
                "batch_size": 8,
                "image_size": None,
            }
            for seed in range(seeds):
                draw = random.Random(f"{label} {budget} {seed}")
                shift = 1.17 * NormalDist().inv_cdf(skill) + 0.2 * b + draw.gauss(0, 0.03)
                right = [float(shift + h + draw.gauss(0, 0.6) > 0) for h in hard]
                wide = factors * (1 + b)
                runs.append(
                    _about(draw)
                    | {
                        "label": label,
                        "identity": {**identity, "seed": seed},
                        "method": {**method, "text": f"{type_name(method)}(rank={8 * (b + 1)})"},
                        "metric": {"name": "accuracy", "value": sum(right) / items},
                        "metrics": {"accuracy": sum(right) / items, "loss": 1.2 - skill},
                        "items": {"accuracy": right, "loss": [0.1 + 0.9 * (1 - r) for r in right]},
                        "parameters": {
                            "base": BASE,
                            "factors": wide,
                            "trainable": BASE if label == "Full" else wide + 3850,
                        },
                        "sites": 48,
                        "attach_seconds": 0.02 + factors / 60_000 + draw.random() * 0.05,
                        "attach_warm_seconds": 0.02 + draw.random() * 0.01 if factors else None,
                        "step_seconds": ms / 1000 + draw.random() * 0.01,
                        "throughput": {"unit": "images", "per_second": 8000 / ms},
                        "peak_memory_bytes": int((1300 + m * 12 + draw.random() * 9) * 2**20),
                        "checkpoint_bytes": 4 * (wide + 3850) * (120 if "SVFT" in label else 2),
                        "merge_error": 0.0 if label in ("Full", "HeadOnly") else 1e-6 * (1 + m),
                        "reload_error": 0.0,
                        "distance": 0.002 * (m + 1) if factors else 0.05,
                        "forgetting": {"name": "feature drift", "before": 0.0, "after": 0.01 * (m + 1)},
                        "loss": _losses(draw, steps, 0.1 + 2 * (1 - skill), (8 + m) / steps * 60),
                        "spectra": _spectra(draw, m) if spectra and factors else None,
                    }
                )
            for lr in RATES if trials else ():
                value = (
                    skill
                    - 0.05 * abs(math.log10(lr / best)) ** 1.5
                    - (0.01 if lr == best else 0.02) * (label == "LoRA")
                )
                tried.append(
                    _about(random.Random(0))
                    | {
                        "label": label,
                        "identity": {**identity, "lr": lr, "seed": 1000, "rung": 0},
                        "rung": 0,
                        "metric": "accuracy",
                        "value": round(value, 4),
                        "loss": 1 - value,
                    }
                )
    spec = {
        "model": "dinov2-vits14",
        "task": "mnist5k",
        "methods": [{"label": label, "method": method, "lr": 1e-3} for label, method, *_ in chosen],
        "seeds": list(range(seeds)),
        "targets": ["all-linear"],
        "exclude": [],
        "budgets": list(budgets),
        "epochs": 1.0,
        "batch_size": 8,
        "head_lr": 0.01,
        "image_size": None,
        "task_options": {"train_size": 1000},
        "search": {"kind": "grid", "trials": 5, "factor": 10**0.5, "metric": None, "seed": 1000} if trials else None,
        "baseline": None,
        "confidence": None,
        "snapshots": 10 if spectra else 0,
    }
    return {"spec": spec, "svdpeft": "0.1.0"}, runs, tried


def failed(run: dict[str, Any], error: str = "RuntimeError: out of memory") -> dict[str, Any]:
    """The record of a run that ended with an error."""
    kept = ("label", "identity", "svdpeft", "git", "python", "versions", "machine", "date", "seconds")
    return {**{name: run[name] for name in kept}, "error": error, "traceback": "Traceback …"}


def store(
    folder: Path, parts: tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]] | None = None, **options: Any
) -> Store:
    """Write a comparison into a folder."""
    head, runs, tried = parts or comparison(**options)
    found = Store(folder)
    found.claim(head)
    for kind, records in (("runs", runs), ("trials", tried)):
        for record in records:
            found.write(kind, found.name(record["label"], record["identity"]), record)
    return found


def type_name(method: dict[str, Any]) -> str:
    return {"sorsa": "SORSA", "pissa": "PiSSA", "lora": "LoRA", "svft": "SVFT", "dora": "DoRA"}.get(
        method["name"], "Full"
    )


def _about(draw: random.Random) -> dict[str, Any]:
    return {
        "svdpeft": "0.1.0",
        "git": {"revision": "82a218ddcd74719004e8724445bcacd7ba582b37", "dirty": False},
        "python": "3.11.7",
        "versions": {"torch": "2.15.0+cpu", "transformers": "5.23.0", "numpy": "2.4.6"},
        "machine": {"platform": "Linux-6.1-x86_64", "processor": "x86_64", "device": "cpu", "threads": 2},
        "date": "2026-11-21T05:03:59+00:00",
        "seconds": 20 + draw.random(),
    }


def _losses(draw: random.Random, steps: int, floor: float, pace: float) -> list[list[float]]:
    return [
        [
            i + 1,
            round(floor + (2.4 - floor) * math.exp(-i / (pace + 1)) * draw.uniform(0.8, 1.2) + draw.gauss(0, 0.04), 4),
        ]
        for i in range(steps)
    ]


def _spectra(draw: random.Random, m: int) -> dict[str, Any]:
    steps = list(range(0, 121, 12))
    sites = [f"blocks.{i}.attn.{part}" for i in range(6) for part in ("qkv[q]", "qkv[v]")]
    pull = [draw.uniform(0.6, 1.4) for _ in sites]

    def rise(scale: float, power: float) -> list[list[float]]:
        return [[round(scale * p * (step / 120) ** power, 6) for p in pull] for step in steps]

    turn = rise(0.02 * (1 + m), 0.7)
    return {
        "steps": steps,
        "sites": sites,
        "delta_sigma": rise(0.005 * (6 - m % 5), 0.9),
        "delta_d": turn,
        "delta_d_assigned": [[0.8 * value for value in values] for values in turn],
    }
