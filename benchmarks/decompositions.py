"""The drivers of the SVD beside LAPACK's and torch's: shape × rank × time × error.

    python -m benchmarks.decompositions [--device cuda] [--threads 2] [--rounds 5]

Weights of SmolLM2-135M and random ones, whose spectrum is the flattest. Interleaved; the median. The error is the
largest of a singular value that was asked for, relative to itself; the angle is the largest between the subspace of the
left vectors and the one of LAPACK in float64. Where σᵣ and σᵣ₊₁ are close it says little: the weight does not tell them
apart either.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.speed.rounds import interleaved
from svdpeft.decomposition import truncated_svd
from svdpeft.models import load

RESULT = Path(__file__).parent / "results" / "decompositions.md"
Found = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # the left vectors and the values


def solvers() -> dict[str, Found]:
    """Name -> what finds the leading triplets."""
    return {
        "exact": lambda w, r: truncated_svd(w, r, "exact")[:2],
        "randomized": lambda w, r: truncated_svd(w, r, "randomized")[:2],
        "auto": lambda w, r: truncated_svd(w, r)[:2],
        "torch.linalg.svd, float32": lambda w, r: _first(torch.linalg.svd(w, full_matrices=False), r),
        "torch.linalg.svd, float64": lambda w, r: _first(torch.linalg.svd(w.double(), full_matrices=False), r),
        "torch.svd_lowrank, 4 iterations": lambda w, r: torch.svd_lowrank(w, r, niter=4)[:2],
        "torch.svd_lowrank, 16 iterations": lambda w, r: torch.svd_lowrank(w, r, niter=16)[:2],
    }


def _given(w: Tensor, rank: int) -> tuple[Tensor, int]:
    return w, rank


def _on(solve: Found, given: tuple[Tensor, int]) -> tuple[Tensor, Tensor]:
    return solve(*given)


def _first(found: tuple[Tensor, ...], rank: int) -> tuple[Tensor, Tensor]:
    return found[0][:, :rank], found[1][:rank]


def weights(device: str) -> dict[str, Tensor]:
    """Matrices by name."""
    layer = load("smollm2-135m").model.model.layers[15]
    draws = torch.Generator().manual_seed(0)
    found = {
        "SmolLM2 q_proj": layer.self_attn.q_proj.weight,
        "SmolLM2 v_proj": layer.self_attn.v_proj.weight,
        "SmolLM2 up_proj": layer.mlp.up_proj.weight,
        "random": torch.randn(1024, 1024, generator=draws),
        "random, larger": torch.randn(2048, 2048, generator=draws),
    }
    return {name: w.detach().float().to(device) for name, w in found.items()}


def errors(w: Tensor, found: tuple[Tensor, Tensor], rank: int) -> tuple[float, float]:
    """Of the values, and the largest angle between the left subspaces, in degrees."""
    u, s, _ = torch.linalg.svd(w.double(), full_matrices=False)
    off = ((found[1].double() - s[:rank]) / s[:rank]).abs().max()
    beside = found[0].double() - u[:, :rank] @ (u[:, :rank].mT @ found[0].double())
    sine = torch.linalg.matrix_norm(beside, 2).clamp(max=1)
    return float(off), float(torch.rad2deg(torch.asin(sine)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [
        "# Drivers of the decomposition",
        "",
        f"`python -m benchmarks.decompositions --device {options.device}` on {date.today()}; {options.threads} threads "
        f"of a shared {platform.machine()} machine, Python {platform.python_version()}, torch "
        f"{torch.__version__.partition('+')[0]}; the median of {options.rounds} interleaved rounds, float32 weights.",
    ]
    for name, w in weights(options.device).items():
        for rank in (16, 32, 128):
            if 2 * rank > min(w.shape):
                continue
            mine = solvers()
            torch.manual_seed(0)
            accuracy = {each: errors(w, solve(w, rank), rank) for each, solve in mine.items()}
            candidates = {each: (partial(_given, w, rank), partial(_on, solve)) for each, solve in mine.items()}
            times = interleaved(candidates, options.rounds, f"{name}, rank {rank}")
            lines += [
                "",
                f"## {name}, {w.shape[0]}×{w.shape[1]}, rank {rank}",
                "",
                "| | ms | error of a value | angle |",
                "| --- | ---: | ---: | ---: |",
            ]
            for each, (off, angle) in accuracy.items():
                lines.append(f"| {each} | {1e3 * statistics.median(times[each]):.1f} | {off:.0e} | {angle:.2g}° |")
            RESULT.write_text("\n".join(lines) + "\n")  # after each: what comes next may be stopped
    print("\n".join(lines))


if __name__ == "__main__":
    main()
