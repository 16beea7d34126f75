"""The list of deliberate defects keeps up with the code, and its runner does what it says."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
from mutants.run import ROOT, TABLE, Mutant, applied, copied, judge, mutants

EVERY = mutants()
ROOMS = {"decomposition", "methods/base", "methods", "layers", "sites", "targets", "adapter", "calibration", "training"}
ROOMS |= {"models", "tasks", "compare", "finetuning", "folders", "analysis", "interop", "cli"}


@pytest.mark.parametrize("mutant", EVERY, ids=lambda mutant: mutant.name)
def test_every_mutant_still_applies(mutant: Mutant):
    broken = mutant.apply((ROOT / mutant.file).read_text(encoding="utf-8"))
    ast.parse(broken)
    files = [word.partition("::")[0] for word in mutant.tests if word.startswith("tests/")]
    assert files, "no tests are named"
    assert all((ROOT / file).is_file() for file in files)


def test_the_list_covers_every_room():
    assert len({mutant.name for mutant in EVERY}) == len(EVERY) >= 60
    assert {mutant.room for mutant in EVERY} >= ROOMS  # and some of a file beside them
    assert min(Counter(mutant.room for mutant in EVERY).values()) >= 2


def test_the_readme_names_the_killer_of_every_mutant():
    rows = re.findall(
        r"^\| `([\w-]+)` \| .* \| `tests/([\w/]+\.py)::(\w+)` \|$", TABLE.with_name("README.md").read_text(), re.M
    )
    assert [name for name, _, _ in rows] == [mutant.name for mutant in EVERY]
    for name, file, test in rows:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project of one file and one test."""
    (tmp_path / "svdpeft").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "svdpeft" / "__init__.py").touch()  # a package that comes before the installed one
    (tmp_path / "svdpeft" / "sums.py").write_text("def add(a, b):\n    return a + b\n")
    test = "from svdpeft.sums import add\n\ndef test_add():\n    while add(2, 0) != 2:\n        assert add(2, 0) < 2\n"
    (tmp_path / "tests" / "test_sums.py").write_text(test)
    return tmp_path


def mutant(before: str, after: str, *tests: str) -> Mutant:
    return Mutant("one", "svdpeft/sums.py", before, after, "the sum", list(tests or ("tests/test_sums.py",)))


def test_a_mutant_is_killed_or_survives_and_is_gone_afterwards(tree: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # half the time of a start
    text = (tree / "svdpeft" / "sums.py").read_text()
    with copied(tree) as copy:
        killed = judge(mutant("a + b", "a + b + 1"), copy)
        assert killed.killer == "tests/test_sums.py::test_add"
        assert judge(mutant("a + b", "a - b"), copy).killer is None
        assert "not enough" in str(judge(mutant("a + b", "1"), copy, timeout=1.0).killer)
        with pytest.raises(RuntimeError, match="ended with 5"):
            judge(mutant("a + b", "a - b", "tests/test_sums.py", "-k", "nothing"), copy)
        assert (copy / "svdpeft" / "sums.py").read_text() == text
    assert (tree / "svdpeft" / "sums.py").read_text() == text


def test_a_mutant_that_does_not_apply_is_refused(tree: Path):
    for before, times in (("a * b", 0), ("a", 3)):
        with (
            pytest.raises(ValueError, match=f"one: what it replaces is {times} times in svdpeft/sums.py"),
            applied(mutant(before, "0"), tree),
        ):
            pass


def test_an_interrupt_restores_the_file(tree: Path):
    file = tree / "svdpeft" / "sums.py"
    text, seen = file.read_text(), []

    def interrupted() -> None:
        with applied(mutant("a + b", "0"), tree):
            seen.append(file.read_text())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == [text.replace("a + b", "0")]
    assert file.read_text() == text
