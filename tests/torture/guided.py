"""The same damage, steered by which lines of the library an example reaches: atheris draws what hypothesis makes of it.

    python tests/torture/guided.py EXAMPLES [READER ...]

``make fuzz`` installs atheris first. What is found is told with its traceback, and written as bytes into the folder at
hand, with which it happens again: ``python tests/torture/guided.py --one 1 READER FILE``.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import atheris  # pyright: ignore[reportMissingImports]

with atheris.instrument_imports(include=["svdpeft"]):
    from torture.damage import bad_bytes, bad_headers, cases, readers, survives, survives_file
    from torture.readers import READERS
    from torture.readers import survives as survives_folder

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ADAPTERS = {"header": (bad_headers(), survives), "bytes": (bad_bytes(), survives_file)}
LONGEST, SEEDS = 4096, 32  # bytes, of which an example is drawn; and drawn ones to begin with


def run(examples: int, name: str, *again: str) -> None:
    """So many examples of one reader, or one that was found; ends the process."""
    options = settings(database=None, deadline=None)
    if name in ADAPTERS:
        strategy, check = ADAPTERS[name]
        cases()
        test = options(given(strategy, readers)(lambda drawn, reader: check(*drawn, reader)))
    else:
        READERS[name].write(whole := Path(tempfile.mkdtemp()) / "files")
        test = options(given(st.data())(lambda data: survives_folder(READERS[name], whole, data.draw)))
    seeds, draw = Path(tempfile.mkdtemp()), random.Random(0)
    for number in range(SEEDS):
        (seeds / str(number)).write_bytes(draw.randbytes(LONGEST))
    limits = [
        f"-runs={examples}",
        f"-max_len={LONGEST}",
        "-len_control=0",
        "-rss_limit_mb=4096",
        "-timeout=60",
        "-seed=1",
    ]
    atheris.Setup([sys.argv[0], *limits, *(again or [str(seeds)])], test.hypothesis.fuzz_one_input)
    atheris.Fuzz()


def main(examples: int, *names: str) -> None:
    """So many for each reader, each in a process of its own."""
    failed = []
    for name in names or (*ADAPTERS, *READERS):
        begun = time.monotonic()
        done = subprocess.run([sys.executable, __file__, "--one", str(examples), name], capture_output=True, text=True)
        if done.returncode:
            failed.append(name)
            print(done.stdout[-4000:], done.stderr[-4000:], sep="\n")
        seen = [line for line in done.stderr.splitlines() if " cov: " in line][-1:]
        print(f"{name}: {examples} examples in {time.monotonic() - begun:.0f} s; {' '.join(seen)}", flush=True)
    assert not failed, failed


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "--one":
        run(int(sys.argv[2]), *sys.argv[3:])
    main(int(sys.argv[1]), *sys.argv[2:])
