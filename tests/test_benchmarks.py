"""The committed comparisons: valid files, and results that can be read and are whole."""

from pathlib import Path

import pytest

from svdpeft.compare.report import read
from svdpeft.compare.spec import read_spec
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
