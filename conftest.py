"""Options of a run, names that every doctest has, and quiet maths: two threads, so that numbers and times repeat."""

import os
import sys
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
    if config.getoption("all"):
        os.environ["SVDPEFT_TESTS"] = "all"  # read where the rows are made, in this process and in workers


@pytest.fixture(autouse=True)
def _names(doctest_namespace):
    doctest_namespace.update(torch=torch, nn=torch.nn, svdpeft=svdpeft, SORSA=svdpeft.SORSA)
