"""That the workers of a run are what the tests take them for."""

import os

import pytest


@pytest.mark.xdist_group("one")
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="only a run of several workers has groups")
def test_a_group_of_tests_stays_on_one_worker(request):
    """Its name is part of what xdist deals out; where it is not, every worker makes what one was to make for all."""
    assert request.node.nodeid.endswith("@one")
