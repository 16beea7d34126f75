"""A table and a picture of what was timed."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.speed.rounds import ratios

OTHERS = (
    "peft",
    "frozen",
    "torch.",
    "import torch",
    "import peft",
    "python",
    "SVFT banded, mult",
    "SORSA of",
)  # in grey


def table(result: dict[str, Any]) -> str:
    """Return the page: per case the ratios to its reference, with quartiles."""
    said = result["options"]
    versions = ", ".join(f"{name} {number.partition('+')[0]}" for name, number in result["versions"].items())
    words = " ".join(f"--{name} {said[name]}" for name in ("model", "device", "dtype", "rank", "batch", "tokens"))
    lines = [
        f"# Time beside Hugging Face PEFT: {said['model']}, {said['device']}, r = {said['rank']}",
        "",
        f"`python -m benchmarks.speed {words}` on {result['date']}, {result['minutes']} minutes; {result['machine']}, "
        f"{said['threads']} threads, Python {result['python']}, {versions}. Rounds are interleaved; a ratio is to the "
        "reference in the same round: the median, and in brackets the quartiles. Factors are in float32.",
    ]
    for case in result["cases"]:
        found, sizes = ratios(case["seconds"], case["reference"]), case["bytes"]
        lines += [
            "",
            f"## {case['title']}",
            "",
            f"| | against {case['reference']} | median s |" + (" file, MB |" if sizes else ""),
            "| --- | ---: | ---: |" + (" ---: |" if sizes else ""),
        ]
        for name, (middle, low, high) in found.items():
            size = f" {sizes[name] / 1e6:.1f} |" if sizes else ""
            seconds = statistics.median(case["seconds"][name])
            lines.append(f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) | {seconds:.3g} |{size}")
    return "\n".join(lines) + "\n"


def picture(result: dict[str, Any], path: Path) -> None:
    """Draw the ratios of every case on a logarithmic axis, with quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sum(len(case["seconds"]) for case in result["cases"])
    heights = [len(case["seconds"]) for case in result["cases"]]
    figure, axes = pyplot.subplots(
        len(heights), 1, figsize=(7, 0.28 * rows + 0.7 * len(heights)), height_ratios=heights, squeeze=False
    )
    for case, ax in zip(result["cases"], axes[:, 0], strict=True):
        found = ratios(case["seconds"], case["reference"])
        for at, (name, (middle, low, high)) in enumerate(reversed(found.items())):
            peer = name.startswith(OTHERS)
            ax.errorbar(
                middle, at, xerr=[[middle - low], [high - middle]], fmt="o", ms=5, color="0.6" if peer else "C0"
            )
            ax.text(middle, at + 0.18, f"{middle:.2f}", fontsize=7, ha="center")
        ax.set_yticks(range(len(found)), list(reversed(found)), fontsize=8)
        ax.set_ylim(-0.6, len(found) - 0.2)
        ax.axvline(1, color="0.8", zorder=0)
        ax.set_xscale("log")
        ax.set_title(f"{case['title']} (1 = {case['reference']})", fontsize=9, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
