"""What a reader of ``layer.weight`` means is told from bytecode, which is another on every Python: so on every one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import readers_table
import torch
from torch import nn

import svdpeft
from svdpeft.sites import readers

TABLE = Path(readers_table.__file__)
VERSIONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]


def interpreter(version: str) -> str | None:
    """A Python of that version that runs: pyenv puts a shim of every Python in the path, and only some do."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for found in (f"python{version}", *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))):
        if shutil.which(found) and not subprocess.run([found, "-c", ""], capture_output=True).returncode:
            return found
    return None


def test_on_this_python():
    assert not readers_table.told_wrongly(readers.means_parameter)


@pytest.mark.parametrize("version", VERSIONS)
def test_on_every_python(version: str):
    if (found := interpreter(version)) is None:
        pytest.skip(f"Python {version} is not here")
    result = subprocess.run([found, str(TABLE), readers.__file__], capture_output=True, text=True)
    assert not result.returncode, result.stdout + result.stderr


def test_the_table_finds_what_is_told_wrongly():
    assert {row[1] for row in readers_table.told_wrongly(lambda frame: True)} >= set(readers_table.USES)
    assert {row[1] for row in readers_table.told_wrongly(lambda frame: False)} >= set(readers_table.QUESTIONS)


def test_this_python_is_in_the_list():
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in VERSIONS


def test_a_function_beside_a_weight_does_not_turn_it_into_the_base():
    """``(len, layer.weight)`` was taken for ``len(layer.weight)``, and gave W0 without the update."""
    layer = nn.Linear(4, 3)
    adapter = svdpeft.attach(layer, svdpeft.LoRA(rank=2))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(1)
    updated = layer.weight.detach().clone()
    assert not torch.equal(updated, layer._parameters["weight"])
    pair = (len, layer.weight)
    assert torch.equal(pair[1], updated)
