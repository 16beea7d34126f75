"""Where the learning rates of the language comparison come from: the loss on fresh word problems, step by step.

    python benchmarks/learning_rates_language.py > benchmarks/results/learning-rates-smollm2-135m.md

One pass over 96 training problems in batches of 8, one seed; the figure is the mean loss of the last four batches, none
of which was seen before. The test problems are never seen.
"""

from __future__ import annotations

import statistics
import sys

import transformers
from tqdm import tqdm

from svdpeft.compare import runner
from svdpeft.compare.spec import Entry, read_spec

GRIDS = {
    "lora": (1e-3, 3e-3, 1e-2),
    "pissa": (3e-4, 1e-3, 3e-3),
    "sorsa": (3e-4, 1e-3, 3e-3),
    "svft": (1e-2, 5e-2),
}


def main() -> None:
    transformers.logging.set_verbosity_error()
    spec = read_spec(model="smollm2-135m", seeds=[100], sizes={"train_size": 96, "test_size": 1})
    print("| method | smollm2-135m: learning rate | mean loss of the last 4 of 12 batches |\n| --- | ---: | ---: |")
    for entry, lr in tqdm([(e, lr) for e in spec.methods for lr in GRIDS[e.method.name]], file=sys.stderr):
        losses = [loss for _, loss in runner.run(spec, Entry(entry.label, entry.method, lr), 100)["loss"]]
        print(f"| {entry.label} | {lr:g} | {statistics.fmean(losses[-4:]):.3f} |", flush=True)


if __name__ == "__main__":
    main()
