"""What every test shares: one thread, a known random state, deterministic property tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "deterministic",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("deterministic")
torch.set_num_threads(1)  # the tensors are tiny: on a busy machine threads that wait for each other cost 50 times more


@pytest.fixture(autouse=True)
def known_random_state() -> Iterator[None]:
    """Every test starts from the same global random state and leaves the global settings of torch alone."""
    torch.manual_seed(1234)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    assert torch.get_default_dtype() == dtype
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No rows for what is not defined: a method on a layer kind, which its ``why_not`` says."""
    from helpers import defined  # after the settings above

    def exists(item: pytest.Item) -> bool:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        return not {"method", "kind"} <= values.keys() or defined(values["method"], values["kind"])

    items[:] = [item for item in items if exists(item)]
