"""Which weights of which networks are adapted, checked on tiny or small models with random weights, in float64.

    python -m benchmarks.coverage timm [--only beit resnet] [--out docs/coverage-timm.md]
    python -m benchmarks.coverage transformers

Nothing is downloaded. Exit status 1 if a model fails; its row says why.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.coverage import timm_models, transformers_models
from benchmarks.coverage.check import Row, check
from benchmarks.coverage.page import page

ROOT = Path(__file__).parents[2]
CASES = {"timm": timm_models.cases, "transformers": transformers_models.cases}


def main() -> None:
    """Check the models, write the page."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.coverage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("library", choices=CASES)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="families or models; the table is printed")
    parser.add_argument("--out", type=Path, help="default: docs/coverage-LIBRARY.md, unless --only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = list(CASES[options.library]())
    if options.only:
        cases = [case for case in cases if {case.family, case.label.split("@")[0]} & set(options.only)]
    rows = []
    bar = tqdm(cases, unit="model")
    for case in bar:
        bar.set_postfix_str(f"{case.family} {case.label}")
        try:
            rows.append(check(case))
        except Exception as error:  # whatever it is, the other models are still checked
            rows.append(Row(case.family, case.label, error=f"{type(error).__name__}: {error}".replace("\n", " ")[:300]))
            bar.write(f"{case.family} {case.label}: {rows[-1].error}")
        gc.collect()
    text, out = page(options.library, rows), options.out
    if out is None and not options.only:
        out = ROOT / "docs" / f"coverage-{options.library}.md"
    if out is None:
        print(text)
    else:
        part = out.with_suffix(".part")
        part.write_text(text)
        os.replace(part, out)
    sys.exit(any(row.error for row in rows))


if __name__ == "__main__":
    main()
