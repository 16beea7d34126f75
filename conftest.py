"""Names that every doctest has, and quiet maths: two threads, so that numbers and times repeat."""

import pytest
import torch

import svdpeft

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _names(doctest_namespace):
    doctest_namespace.update(torch=torch, nn=torch.nn, svdpeft=svdpeft, SORSA=svdpeft.SORSA)
