"""Options of a run, who runs what, names that every doctest has, and two threads, so that numbers and times repeat."""

import os
import resource
import sys
import zlib
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "tests"))
import shapes  # noqa: F401  before svdpeft, whose shapes it has checked

import svdpeft

collect_ignore = ["docs/conf.py", "docs/site"]  # Sphinx's
torch.set_num_threads(2)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="every variant on every layer: see tests/rows.py")


def pytest_configure(config):
    config.addinivalue_line("markers", "apart: in a fork, for its large model; see tests/conftest.py")
    if config.getoption("all"):
        os.environ["SVDPEFT_TESTS"] = "all"  # read where the rows are made, in this process and in workers


# What takes longest, foremost: a run ends when its last worker does.
FIRST = (
    *("launchers", "commands", "train", "derived_files", "examples", "backends", "protocol", "compare_language"),
    *("killed", "compare", "properties_files", "rwkv", "harness", "report_page", "coverage", "calibration"),
)
PARTS = 32  # of a file of properties: they even out the end, since no row of them shares anything with another
MEMORY = 2.5e9  # bytes of a worker. 1.7 to 2.1 are seen, by machine, 1.2 of them imports; the aim is 1.5
_peaks = {}


def _file(name):
    return name.partition("::")[0]


def _unit(name):
    """What a test goes to a worker with."""
    part = f" {zlib.crc32(name.encode()) % PARTS}" if "/test_properties_" in name else ""
    return _file(name) + part


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Long files first and properties last."""

    def turn(item):
        word = Path(_file(item.nodeid)).stem.removeprefix("test_")
        return FIRST.index(word) if word in FIRST else len(FIRST) + word.startswith("properties_")

    items.sort(key=turn)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A worker gets whole files, whose models and folders it then makes once, and properties in parts."""
    from xdist.scheduler import LoadGroupScheduling

    class Files(LoadGroupScheduling):
        def _split_scope(self, name):
            group = super()._split_scope(name)
            return _unit(name) if group == name else group  # which tests may have said themselves

    config.option.loadscopereorder = False  # in the order above
    return Files(config, log)


def pytest_sessionfinish(session):
    """A worker says how large it was; one that was too large is a failure of the run."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    elif max(_peaks.values(), default=0) > MEMORY and session.exitstatus == 0 and not session.config.getoption("all"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    _peaks[node.gateway.id] = getattr(node, "workeroutput", {}).get("peak", 0)


def pytest_terminal_summary(terminalreporter):
    if _peaks:
        told = ", ".join(f"{name} {peak / 1e9:.2f} GB" for name, peak in sorted(_peaks.items()))
        terminalreporter.write_line(f"peak memory: {told}; allowed are {MEMORY / 1e9:.1f}: docs/architecture.md, Tests")


@pytest.fixture(autouse=True)
def _names(doctest_namespace):
    doctest_namespace.update(torch=torch, nn=torch.nn, svdpeft=svdpeft, SORSA=svdpeft.SORSA)
