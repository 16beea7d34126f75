"""What a shell completes, as the shell asks for it: the right names, and nothing heavy is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import svdpeft
from svdpeft.cli.completion import MODELS
from svdpeft.models import language, vision
from svdpeft.registry import KINDS, METHODS, TASKS, Registry

ASK = """
import sys
from svdpeft.cli import app
try:
    app(prog_name="svdpeft")
finally:
    print(*sorted({name.split(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def complete(*words: str) -> list[str]:
    """What bash is told for the last of the words."""
    asked = {"_SVDPEFT_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    command = [sys.executable, "-c", ASK]
    found = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "timm", "numpy"} & set(found.stderr.split())
    return found.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("svdpeft", "methods", "lora"), [name for name in METHODS if name.startswith("lora")]),
        (("svdpeft", "cite", "sorsa", "pi"), ["pica", "pissa"]),
        (("svdpeft", "train", "--method", "so"), ["sorsa"]),
        (("svdpeft", "compare", "--methods", "lora,svft:pattern=banded,sors"), ["lora,svft:pattern=banded,sorsa"]),
        (("svdpeft", "compare", "--task", "word"), ["wordproblems"]),
        (("svdpeft", "eval", "d"), ["dinov2-vits14"]),
        (("svdpeft", "export", "my-adapter", "out", "--base", "h"), ["hf:"]),
        (("svdpeft", "plan", "--model", "sm"), ["smollm2-135m"]),
        (("svdpeft", "merge", "min"), ["minilm-l6"]),
        (("svdpeft", "train", "--meth"), ["--method"]),
        (("svdpeft", "decom"), ["decompose"]),
        (("svdpeft", "eval", "models/mine"), []),  # then the shell takes files
    ],
    ids=lambda words: words[-1] if isinstance(words, tuple) else "",
)
def test_a_shell_completes(words: tuple[str, ...], expected: list[str]):
    assert complete(*words) == expected


@pytest.mark.parametrize("registry", [METHODS, TASKS, KINDS], ids=lambda registry: registry.what)
def test_the_names_that_are_offered_are_the_registered_ones(registry: Registry):
    fresh: Registry = Registry(registry.what, registry.package)
    ours = [name for name in registry if registry[name].__module__.startswith(registry.package)]
    assert fresh.offered() == ours


def test_the_models_that_are_offered_are_the_embedded_ones():
    assert [name for name in MODELS if not name.endswith(":")] == sorted({**vision.EMBEDDED, **language.EMBEDDED})


def test_what_is_public_is_there_without_having_been_imported():
    for name in (*svdpeft.__all__, *svdpeft._LATE, *svdpeft._PACKAGES):
        assert getattr(svdpeft, name) is not None
        assert name in dir(svdpeft)
