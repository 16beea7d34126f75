"""The scripts in examples/ run, without a warning, and do what they say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*arguments: object) -> str:
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_scientific_computing(tmp_path):
    numbers, picture = tmp_path / "numbers.json", tmp_path / "picture.png"
    printed = run(EXAMPLES / "scientific_computing.py", "--quick", "--json", numbers, "--plot", picture)
    record = json.loads(numbers.read_text())
    rows = {row["method"]: row for row in record["rows"]}
    pretrained = rows.pop("pretrained")
    assert rows.keys() == {"SORSA", "PiSSA", "LoRA", "SVFT", "full"}
    for row in rows.values():
        assert row["new"][0] < pretrained["new"][0]
    factored = [row["trainable"] for name, row in rows.items() if name != "full"]
    assert max(factored) < 1.02 * min(factored)
    assert max(record["reference"].values()) < 1e-6  # two ways to solve the equation agree
    (difference,) = re.findall(r"largest difference in float64: (\S+)", printed)
    assert float(difference) < 1e-12
    assert record["promises"]["detached"]
    assert record["promises"]["loaded"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers.json", "picture.png"]


def test_ship(tmp_path):
    printed = run(EXAMPLES / "ship.py", "--out", tmp_path)
    told = re.findall(r"^(.*): largest difference (\S+)$", printed, re.M)
    assert len(told) == 5
    assert max(float(difference) for _, difference in told) < 1e-4
    assert {"model.pth", "model.pt2"} <= {path.name for path in tmp_path.iterdir()}


def test_own_pictures(tmp_path):
    printed = run(EXAMPLES / "own_pictures.py", "--out", tmp_path / "adapter")
    (accuracy,) = re.findall(r"seen: (\S+);", printed)
    assert float(accuracy) > 0.9
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {"adapter.json", "adapter.safetensors"}
