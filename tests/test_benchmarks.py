"""The committed comparisons: valid files, results that can be read, and a README that prints what was measured."""

import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from svdpeft.compare.reading import read_spec
from svdpeft.compare.report import read, terminal
from svdpeft.compare.run import Job
from svdpeft.compare.runner import lines
from svdpeft.compare.search import search
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


@pytest.mark.parametrize(
    ("name", "methods", "rates"), [("cnn", 17, 5), ("vit", 17, 3), ("words", 8, 3), ("rwkv", 14, 3)]
)
def test_the_first_comparison_is_the_runs_that_were_planned(name, methods, rates, tmp_path):
    """Ten seeds for each method and two for each of its rates, none in common, each a file of its own."""
    spec = read_spec(ROOT / "benchmarks" / f"first-{name}.toml")
    grid, store = lines(spec), Store(tmp_path)
    assert len(grid) == methods
    trained = []

    def train(jobs):
        trained.extend(jobs)
        # the loss is least, and an accuracy highest, at the middle: no edge is followed
        return [{"metric": "loss", "value": abs(math.log(job.entry.lr / middle[job.entry.label]))} for job in jobs]

    middle = {entry.label: entry.lr for entry, _ in grid}
    found = search(spec, grid, train)
    assert {key[0]: each["lr"] for key, each in found.items()} == middle
    runs = [Job(spec, entry, limit, seed) for entry, limit in grid for seed in spec.seeds]
    assert (len(trained), len(runs)) == (methods * rates * 2, methods * 10)
    assert len({store.name(job.entry.label, job.identity()) for job in [*trained, *runs]}) == len(trained) + len(runs)
    assert not {job.seed for job in trained} & {job.seed for job in runs}
    assert spec.search.further == 4
    assert spec.baseline == "LoRA"
    assert len(spec.budgets) == 1
    assert {"LoRA", "PiSSA", "SORSA", "SORSA γ 0", "MiLoRA", "SVFT plain"} <= middle.keys()
