"""Names that every doctest has, and quiet maths: two threads, so that numbers and times repeat."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "tests"))
import shapes  # noqa: F401  before svdpeft, whose shapes it has checked

import svdpeft

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _names(doctest_namespace):
    doctest_namespace.update(torch=torch, nn=torch.nn, svdpeft=svdpeft, SORSA=svdpeft.SORSA)
