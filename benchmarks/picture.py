"""The committed comparisons side by side: metric and forgetting against trainable parameters, for print and dark.

python -m benchmarks.picture
"""

from __future__ import annotations

from pathlib import Path

from svdpeft.compare.report import read
from svdpeft.compare.report.pictures import side_by_side
from svdpeft.compare.store import Store

RESULTS = Path(__file__).parent / "results"
SHOWN = (("zoo/efficientnet-lite0", "accuracy"), ("demo", "accuracy"), ("wordproblems", "loss"))


def main() -> None:
    comparisons = [read(Store(RESULTS / folder), metric) for folder, metric in SHOWN]
    for name, dark in (("side-by-side.png", False), ("side-by-side-dark.png", True)):
        (RESULTS / name).write_bytes(side_by_side(comparisons, dark))


if __name__ == "__main__":
    main()
