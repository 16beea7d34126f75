"""Comparisons that are killed and gone on with until they end: as if left alone, and whole at each moment.

    python tests/torture/comparing.py FOLDER KILLS

Most of it is forked and on a model of 500 weights; a twentieth of the kills are of the command with two workers.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from comparison import REAL, Signs, load
from safetensors import safe_open
from torture.kills import Span, attempt, draws

from svdpeft.compare import records, report
from svdpeft.compare.reading import read_spec
from svdpeft.compare.runner import Engine, compare
from svdpeft.compare.store import Store
from svdpeft.finetuning import session
from svdpeft.registry import TASKS

TINY: dict[str, Any] = {
    "model": "tiny",
    "task": "signs",
    "methods": "pissa:rank=4,svft",
    "seeds": [0, 1],
    "epochs": 1,
    "batch_size": 16,
    "search": {"trials": 3},
}
SHORT = TINY | {"methods": "svft", "search": False}
# What is another in every run: clocks, and what the process had in memory.
CLOCKS = {"date", "seconds", "attach_seconds", "attach_warm_seconds", "step_seconds", "throughput", "peak_memory_bytes"}
ENDS = {".html": b"</html>\n", ".png": b"IEND\xaeB`\x82", ".csv": b"\n", ".md": b"\n"}


def work(folder: Path, spec: dict[str, Any]) -> None:
    """What ``svdpeft compare --keep-adapters all`` does, in this process."""
    TASKS._classes["signs"], Signs.name, session.load = Signs, "signs", load  # type: ignore[assignment]
    compare(read_spec(**spec), folder, Engine(keep="all"))
    report.write(Store(folder))


def found(folder: Path) -> dict[str, Any]:
    """What a comparison has written, without the clocks; every file of it must be whole."""
    store, seen = Store(folder), {}
    assert not folder.exists() or store.comparison() is not None or not any(folder.glob("*/*.json"))
    for kind in ("trials", "runs"):
        done, damaged = store.read(kind, lambda record, kind=kind: records.check(kind, record))
        assert not damaged, damaged
        for record in done:
            assert "error" not in record, record["error"]
            seen[f"{kind}/{store.name(record['label'], record['identity'])}"] = _without_clocks(record)
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            assert path.read_bytes().endswith(ENDS.get(path.suffix, b"")), path
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as opened:
                    values = {name: opened.get_tensor(name).tolist() for name in sorted(opened.keys())}
                seen[str(path.relative_to(folder))] = values
    return seen


def _without_clocks(record: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({key: value for key, value in record.items() if key not in CLOCKS}))


def killed_until_it_ends(
    folder: Path, spec: dict[str, Any], expected: dict[str, Any], span: Span, draw: random.Random, most: int
) -> int:
    """How often one comparison was killed, each time soon after it has begun to write again; it ends as expected."""
    kills = 0
    while attempt(lambda: work(folder, spec), **(draws(span, draw) if kills < most else {})).killed:
        kills += 1
        so_far = found(folder)
        assert {name: expected[name] for name in so_far} == so_far
    assert found(folder) == expected, "it ended elsewhere"
    return kills


def functions(folder: Path, spec: dict[str, Any], count: int) -> None:
    """So many kills of comparisons in processes that were forked."""
    begun = time.monotonic()
    whole = attempt(lambda: work(folder / "whole", spec)).span
    expected = found(folder / "whole")
    part = Span(3 * whole.operations // len(expected), 3 * whole.seconds / len(expected))
    draw, kills, ended = random.Random(0), 0, 0
    while kills < count:
        kills += killed_until_it_ends(folder / f"killed-{ended}", spec, expected, part, draw, count - kills)
        ended += 1
    told = f"{ended} ended as expected, {len(expected)} records and adapters each"
    print(f"comparisons: {kills} kills in {time.monotonic() - begun:.0f} s, {told}", flush=True)


def commands(folder: Path, count: int) -> None:
    """So many kills of the command with two workers, which may be at work a moment longer; then it is let end."""
    options = {**REAL, "methods": "head-only,lora", "seeds": [0, 1]}
    (folder / "spec.toml").write_text("\n".join(map(_toml, options.items())))
    program = [sys.executable, "-c", "from svdpeft.cli import app; app()"]
    command = [*program, "compare", str(folder / "spec.toml"), "--workers", "2", "--out"]
    begun = time.monotonic()
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, str(folder / "left-alone")], check=True, **quiet)
    takes, draw = time.monotonic() - begun, random.Random(0)
    expected, kills = found(folder / "left-alone"), 0
    while kills < count:
        where, status = folder / f"commanded-{kills}", -signal.SIGKILL
        while status == -signal.SIGKILL:
            process = subprocess.Popen([*command, str(where)], **quiet)
            try:
                status = process.wait(draw.random() * takes if kills < count else None)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
                kills += 1
                found(where)
        assert status == 0, "it could not go on"
        assert found(where) == expected, "it ended elsewhere"
    seconds = time.monotonic() - begun
    print(f"svdpeft compare --workers 2: {kills} kills in {seconds:.0f} s, ended as expected", flush=True)


def _toml(pair: tuple[str, Any]) -> str:
    name, value = pair
    if not isinstance(value, dict):
        return f"{name} = {json.dumps(value)}"
    return f"{name} = {{{', '.join(f'{key} = {each}' for key, each in value.items())}}}"


def main(folder: Path, count: int) -> None:
    """So many kills; fewer than twenty of a comparison of two runs."""
    folder.mkdir(parents=True, exist_ok=True)
    functions(folder, TINY if count >= 20 else SHORT, count)
    if count >= 20:
        commands(folder, count // 20)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
