"""That the workers of a run are what the tests take them for."""

import os
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.xdist_group("one")
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="only a run of several workers has groups")
def test_a_group_of_tests_stays_on_one_worker(request):
    """Its name is part of what xdist deals out; where it is not, every worker makes what one was to make for all."""
    assert request.node.nodeid.endswith("@one")


@pytest.fixture
def names():
    """What the options of a run are made of."""
    return runpy.run_path(str(ROOT / "conftest.py"))


def test_what_takes_longest_is_there_and_comes_first(names):
    assert all((ROOT / "tests" / f"test_{word}.py").is_file() for word in names["FIRST"])
    files = [
        "docs/a.md::a.md",
        "tests/test_rwkv.py::a",
        "tests/test_properties_two.py::a",
        "tests/test_launchers.py::a",
    ]
    items = [SimpleNamespace(nodeid=name) for name in files]
    names["pytest_collection_modifyitems"](items)
    assert [item.nodeid for item in items] == [files[3], files[1], files[0], files[2]]


def test_a_file_is_one_unit_and_properties_are_many(names):
    unit = names["_unit"]
    assert {unit(f"tests/test_rwkv.py::test_{i}") for i in range(9)} == {"tests/test_rwkv.py"}
    parts = {unit(f"tests/test_properties_two.py::test_{i}") for i in range(2000)}
    assert len(parts) == names["PARTS"]


@pytest.mark.parametrize(("peak", "every", "status"), [(2.0e9, False, 0), (2.6e9, False, 1), (2.6e9, True, 0)])
def test_a_worker_that_took_too_much_memory_fails_the_run(names, peak, every, status):
    names["pytest_testnodedown"](SimpleNamespace(gateway=SimpleNamespace(id="gw0"), workeroutput={"peak": peak}), None)
    session = SimpleNamespace(config=SimpleNamespace(getoption=lambda name: every), exitstatus=0)
    names["pytest_sessionfinish"](session)
    assert session.exitstatus == status
    lines = []
    names["pytest_terminal_summary"](SimpleNamespace(write_line=lines.append))
    assert f"gw0 {peak / 1e9:.2f} GB" in lines[0]


def test_a_worker_says_its_peak(names):
    said = {}
    names["pytest_sessionfinish"](SimpleNamespace(config=SimpleNamespace(workeroutput=said)))
    assert 1e8 < said["peak"] < 1e11
