"""Classes of texts: MiniLM and a CSV file with the columns text and label.

    python examples/classify_texts.py --data reviews.csv --out runs/reviews

Without ``--data`` a few reviews are written.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from shell import run

THINGS = {"train": ("book", "film", "meal", "hotel", "concert", "phone"), "validation": ("game", "trip", "song")}
SAID = {
    "good": ("I loved this {}.", "A wonderful {}, thank you.", "The best {} in years.", "This {} made me happy."),
    "bad": ("I hated this {}.", "A terrible {}, no thanks.", "The worst {} in years.", "This {} made me angry."),
}


def write(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, things in THINGS.items():
        rows = [(say.format(thing), label) for thing in things for label, says in SAID.items() for say in says]
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    return folder


def main(data: Path | None, out: Path, epochs: int) -> None:
    data = write(out / "reviews") if data is None else data
    run(
        f"svdpeft train --model minilm-l6 --data {data} --task classification --method pissa:rank=4 --lr 2e-3 "
        f"--head-lr 1e-2 --targets query --targets value --epochs {epochs} --out {out / 'adapter'}"
    )
    run(
        f"svdpeft eval minilm-l6 --task classification --option data={data} --split validation "
        f"--adapter {out / 'adapter'}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a CSV file, or a folder with train.csv and validation.csv")
    parser.add_argument("--out", type=Path, default=Path("runs/reviews"))
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args()
    main(given.data, given.out, given.epochs)
