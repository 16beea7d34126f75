"""Time beside Hugging Face PEFT, in one process and in interleaved rounds.

    python -m benchmarks.speed                                          # SmolLM2-135M on the CPU: make bench
    python -m benchmarks.speed --model 7b:2 --device cuda --dtype bfloat16 --rank 128 --only attaching steps
    python -m benchmarks.speed --model tiny --rounds 1                   # whether all of it runs

Writes ``results/speed-<device>-<model>.json``, a table and a picture beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.cases import CASES, Case
from benchmarks.speed.models import Bench
from benchmarks.speed.report import picture, table
from benchmarks.speed.rounds import interleaved

RESULTS = Path(__file__).parent.parent / "results"


def measured(case: Case) -> dict[str, Any]:
    """Time a case: plain values."""
    times = interleaved(case.candidates, case.rounds, case.title)
    return {"title": case.title, "reference": case.reference, "seconds": times, "bytes": case.sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="or 7b:LAYERS, tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="of every case, in the place of its own")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", default=CASES, help=", ".join(CASES))
    parser.add_argument("--without", nargs="+", help="candidates that are left out", default=[])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(options.threads)
    names = ("model", "device", "dtype", "rank", "batch", "tokens")
    given = {name: getattr(options, name) for name in names if name not in ("model", "dtype")}
    bench = Bench(options.model, dtype=getattr(torch, options.dtype), **given)
    stem = options.out / f"speed-{options.device}-{options.model.replace(':', '-')}"
    options.out.mkdir(parents=True, exist_ok=True)
    started, found = time.perf_counter(), []
    result = {
        "options": {name: getattr(options, name) for name in (*names, "threads")},
        "date": str(date.today()),
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "cases": found,
    }
    for make in (CASES[name] for name in CASES if name in options.only):  # only one case is in memory at a time
        case = make(bench)
        left = {name: candidate for name, candidate in case.candidates.items() if name not in options.without}
        found.append(measured(replace(case, candidates=left, rounds=options.rounds or case.rounds)))
        result["minutes"] = round((time.perf_counter() - started) / 60, 1)
        for suffix, text in ((".json", json.dumps(result, indent=1) + "\n"), (".md", table(result))):
            stem.with_suffix(suffix).write_text(text)  # after each case: what comes next may be stopped
    picture(result, stem.with_suffix(".png"))
    print(table(result))


if __name__ == "__main__":
    main()
