"""The committed comparisons: valid files, results that can be read, and a README that prints what was measured."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from svdpeft.compare.reading import read_spec
from svdpeft.compare.report import read, terminal
from svdpeft.compare.store import Store

ROOT = Path(__file__).parent.parent
SPECIFICATIONS = sorted((ROOT / "benchmarks").glob("*.toml"))
RESULTS = sorted(file.parent for file in (ROOT / "benchmarks" / "results").rglob("comparison.json"))


def named(path):
    return str(path.relative_to(ROOT / "benchmarks"))


@pytest.mark.parametrize("file", SPECIFICATIONS, ids=named)
def test_a_specification_is_valid(file):
    read_spec(file)


@pytest.mark.parametrize("folder", RESULTS, ids=named)
def test_committed_results_are_whole(folder):
    results = read(Store(folder))
    assert not results.damaged
    assert not results.without("error")
    assert all(len(row.seeds) == 3 for row in results.rows)
    assert all(not run["git"]["dirty"] for row in results.rows for run in row.runs)
    for name in ("report.md", "report.html", "report.png", "loss.png", "results.csv"):
        assert (folder / name).stat().st_size


def test_the_table_of_the_readme_is_what_was_measured():
    (printed,) = re.findall(r"```\n(efficientnet-lite0 on .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(terminal(read(Store(ROOT / "benchmarks" / "results" / "demo"))))
    lines = [line.rstrip() for line in captured.get().splitlines()]
    table = lines[: lines.index("")]
    assert printed.splitlines() == table
