"""What the sandbox is told, read where none can be started, too; ``test_sandbox`` sees it hold."""

from __future__ import annotations

import ast
import shutil

import pytest

from svdpeft.tasks import sandbox
from svdpeft.tasks.sandbox import MIB


def test_every_limit_but_the_time_is_one_that_cannot_be_raised():
    told = sandbox._bootstrap(100, 8, 300 * MIB).partition("\n")[0].partition(" = ")
    assert told[0] == "SIZE, USER, LIMITS"
    size, _, limits = ast.literal_eval(told[2])
    assert size == 100
    found = {name: (soft, hard) for name, soft, hard in limits}
    assert found.pop("CPU") == (8, 9), "SIGXCPU says that it was the time; SIGKILL follows"
    assert {name: hard for name, (_, hard) in found.items()} == {name: soft for name, (soft, _) in found.items()}
    assert found["AS"] == (300 * MIB, 300 * MIB)
    assert {"FSIZE", "NPROC", "NOFILE", "STACK", "MSGQUEUE", "CORE"} <= found.keys()


def test_every_fence_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    command = sandbox._command(7)
    assert {"--unshare-net", "--unshare-pid", "--unshare-ipc", "--die-with-parent", "--new-session"} <= set(command)
    assert command[-5:] == ["--remount-ro", "/", "--seccomp", "7", "--"]
