"""What every test shares: one thread, a known random state, deterministic property tests."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
collect_ignore = ["light", "mutants", "torture"]  # programs, no tests
torch.set_num_threads(1)  # the tensors are tiny: on a busy machine threads that wait for each other cost 50 times more
# At its first backward autograd starts threads for the devices it sees. Shapes without values let it see one: had they
# been first, no fork could go backward.
torch.zeros((), requires_grad=True).backward()


@pytest.fixture(autouse=True)
def known_random_state(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test starts from the same global random state and leaves the global settings of torch alone.

    Adapters know of each other across models: those of a test that has ended, which the collector has not come to, are
    no longer among them. Each costs the next ones a walk over its model.
    """
    from helpers import working_in  # after the settings above
    from rows import has

    from svdpeft.adapter import roster

    live = dict(roster._live)
    torch.default_generator.manual_seed(1234)  # of the CPU: torch.manual_seed looks for devices, 0.9 ms
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    values = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    kind = values.get("kind")
    with working_in(torch.float64 if not isinstance(kind, tuple) or has(kind, "float64") else torch.float32):
        yield
    roster._live.clear()
    roster._live.update(live)
    assert torch.get_default_dtype() == dtype
    assert not torch._C._len_torch_function_stack(), "a default device, or another mode, slows every call after this"
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The task ``signs`` and a model called ``tiny``; each method at its own learning rate."""
    from comparison import Signs, load  # these import transformers, which most tests do without

    from svdpeft.finetuning import session
    from svdpeft.registry import TASKS

    monkeypatch.setitem(TASKS._classes, "signs", Signs)
    monkeypatch.setattr(Signs, "name", "signs", raising=False)
    monkeypatch.setattr(Signs, "looked_at", [])
    monkeypatch.setattr(session, "load", load)
    return {"model": "tiny", "task": "signs", "seeds": [0, 1], "epochs": 1, "batch_size": 16, "search": False}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No rows for what is not defined: a method on a layer kind, which its ``why_not`` says."""
    from rows import defined  # after the settings above

    def exists(item: pytest.Item) -> bool:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        return not {"method", "kind"} <= values.keys() or defined(values["method"], values["kind"])

    items[:] = [item for item in items if exists(item)]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """What is marked ``apart`` runs in a fork, with which the memory of a whole pretrained model is gone for sure."""
    if pyfuncitem.get_closest_marker("apart") is None or not hasattr(os, "fork") or torch.cuda.is_available():
        return None
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the threads that a worker listens with
        child = os.fork()
    if not child:
        told = ("", "")
        torch.set_num_threads(torch.get_num_threads())  # makes torch's pool anew, before several threads do so at once
        try:
            pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames})
        except pytest.skip.Exception as skipped:
            told = ("skipped", str(skipped))
        except BaseException:
            told = ("failed", traceback.format_exc())
        with open(writing, "w") as file:
            json.dump(told, file)
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        said = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    how, why = json.loads(said) if status == 0 else ("failed", f"the process apart ended with {status}")
    if how == "skipped":
        pytest.skip(why)
    if how == "failed":
        pytest.fail(why, pytrace=False)
    return True


RESIDENT = Path("/proc/self/statm")
LARGE = 2**25  # bytes
_least = [0]  # resident after the last release


def resident() -> int:
    return int(RESIDENT.read_text().split()[1]) * resource.getpagesize()


def pytest_runtest_logfinish() -> None:
    """Give a large model back before the next test makes one: models are cycles, and the allocator keeps what was."""
    if RESIDENT.exists() and resident() > _least[0] + LARGE:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # glibc's
            ctypes.CDLL(None).malloc_trim(0)
        _least[0] = resident()


_module = [""]


def pytest_runtest_logstart(nodeid: str, location: tuple[str, int | None, str]) -> None:
    """Before the first test of a file, let go of what was compiled, and keep the collector from walking all that stays:
    torch, transformers, the items, the caches of sympy. A comparison collects often, since it measures memory, and each
    time would cost half a second."""
    if location[0] != _module[0]:
        _module[0] = location[0]
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        if sys.version_info < (3, 13):  # children that 3.13.0 forks afterwards hang or crash: a loader's, the harness's
            gc.freeze()
