"""Processes that accelerate's launcher starts with the files in examples/launch train to what one process trains to."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LIGHT
from launched import METHODS, NOT_WITH_DEEPSPEED, TO_BE_KILLED, train
from rows import EVERYTHING
from safetensors.torch import load_file

import svdpeft

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def launching(scheme: str, *command: object) -> dict[str, Any]:
    """What starts a command as ``accelerate launch`` does, in the words of ``subprocess``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        ROOT / f"examples/launch/{scheme}.yaml",
    ]
    # Where this svdpeft and its command are.
    before = {"PYTHONPATH": f"{LIGHT}{os.pathsep}{ROOT}", "PATH": Path(sys.executable).parent}
    more = {name: os.pathsep.join([str(path), os.environ.get(name, "")]) for name, path in before.items()}
    more["OMP_NUM_THREADS"] = "1"
    if scheme == "zero3" and not torch.cuda.is_available():
        more["DS_ACCELERATOR"] = "cpu"
    return {"args": [*start, "--main_process_port", str(port), *map(str, command)], "env": os.environ | more}


def launch(scheme: str, *command: object, folder: Path = ROOT, fails: bool = False) -> str:
    """Run it in a folder, and return what it says; where it is to fail, of its errors."""
    run = subprocess.run(**launching(scheme, *command), cwd=folder, capture_output=True, text=True, timeout=300)
    assert (run.returncode != 0) == fails, run.stderr[-10_000:]
    return run.stderr if fails else run.stdout


@cache
def alone(folder: Path, name: str, dtype: torch.dtype) -> tuple[list[float], dict[str, torch.Tensor]]:
    """What one process trains to, without an interruption."""
    losses = train(folder, name, dtype)
    return losses, load_file(folder / "final" / "adapter.safetensors")


@pytest.mark.parametrize(
    ("scheme", "dtype", "bound", "killed"),
    [
        ("ddp", "float64", 1e-13, "one of them" if EVERYTHING else ""),
        ("fsdp2", "float64", 1e-13, "all of them" if EVERYTHING else ""),
        pytest.param(
            "zero3",
            "float32",  # DeepSpeed knows no float64
            2e-6,
            "",
            marks=pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed"),
        ),
    ],
)
def test_two_processes_train_every_method_to_what_one_does(tmp_path, tmp_path_factory, scheme, dtype, bound, killed):
    """One of the methods in processes that were killed in the middle, the others interrupted and resumed in one."""
    command = (ROOT / "tests" / "launched.py", tmp_path, dtype)
    if killed:
        kill(launching(scheme, *command, "wait"), tmp_path, killed)
    launch(scheme, *command)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["losses"] == second["losses"]
    left_out = NOT_WITH_DEEPSPEED if scheme == "zero3" else set()
    assert first["losses"].keys() == METHODS.keys() - left_out
    found = {name: (name, losses) for name, losses in first["losses"].items()}
    if killed:
        assert first["killed"] == second["killed"]
        found["killed"] = TO_BE_KILLED, first["killed"]
    for folder, (name, losses) in found.items():
        check_training(tmp_path / folder, losses, tmp_path_factory.getbasetemp() / f"one-{dtype}", name, bound)
    assert first["refused"].keys() == left_out
    assert all("DeepSpeed takes its step within backward" in why for why in first["refused"].values())
    # Every weight was decomposed once, by one of the two, for all methods and both trainings of each.
    decomposed = Counter(first["decomposed"]) + Counter(second["decomposed"])
    assert len(decomposed) == 6
    assert set(decomposed.values()) == {1}
    if scheme == "fsdp2":
        check_collectives(first["collectives"], tmp_path / "gathered")


def kill(start: dict[str, Any], folder: Path, whom: str) -> None:
    """By SIGKILL, which nobody hears: one process, whose end ends the others, or the launcher and all it started."""
    there: list[int] = []
    with subprocess.Popen(**start, start_new_session=True, stderr=subprocess.PIPE) as run:
        try:
            until = time.monotonic() + 200
            while len(there) < 2:
                assert run.poll() is None, run.stderr.read()[-10_000:]
                assert time.monotonic() < until, "no step was reached"
                there = [int(file.name.rpartition("-")[2]) for file in folder.glob("*-is-*")]
                time.sleep(0.05)
            if whom == "one of them":
                os.kill(there[1], signal.SIGKILL)
                assert run.wait(timeout=100) != 0
        finally:
            for each in (run.pid, *there):  # each has a session of its own
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(each, signal.SIGKILL)
    assert not list(folder.glob("*.json"))


def check_training(folder: Path, losses: list[float], one: Path, name: str, bound: float) -> None:
    """What two processes have left in a folder is what one process comes to."""
    expected, tensors = alone(one / name, name, getattr(torch, one.name.removeprefix("one-")))
    assert losses == pytest.approx(expected, abs=5e-6), name  # transformers forms them in float32
    found = load_file(folder / "final" / "adapter.safetensors")
    assert found.keys() == tensors.keys()
    for key, value in tensors.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=bound, msg=f"{name}: {key}")
    assert not list(folder.glob("**/*model*.safetensors"))  # the base is in no file


def check_collectives(found: dict, folder: Path) -> None:
    groups, factors = Counter(found["groups"]), Counter(found["factors"])
    # Forward and backward gather what FSDP gathers by itself: block by block, and the blocks once more on the way back.
    assert Counter(found["training"]) == groups + Counter(found["groups"][:-1])
    # The method's own step and a save gather factors, none twice, and nothing as large as a weight of the base.
    for what in ("step", "saving"):
        assert found[what], what
        assert Counter(found[what]) <= factors, what
        assert max(found[what]) < found["smallest"], what
    assert Counter(found["saving"]) == factors
    assert "weight is sharded over processes" in found["merge"]
    assert "is sharded over processes: attach before fully_shard" in found["attach"]
    base = train.__globals__["model"](torch.float64)
    assert svdpeft.load(base, folder).trainable_count > 0  # the file knows its base, which it did not gather
