"""Put one deliberate defect after the other into a copy of the library, and see which test notices each.

``mutants.toml`` lists them, ``README.md`` says which test killed which. From the root of the repository::

    python tests/mutants/run.py [--only NAME …] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("mutants.toml")
COPIED = ("svdpeft", "tests", "docs", "examples", "README.md", "conftest.py", "pyproject.toml")
TIMEOUT = 300.0  # seconds for the tests of one mutant: a search that never ends is noticed, too
RED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
PASSED, FAILED, INTERRUPTED = 0, 1, 2  # of pytest; interrupted: a file of tests cannot be imported


@dataclass(frozen=True)
class Mutant:
    """A defect that a programmer could make.

    Args:
        name: of the mutant.
        file: that it is in.
        before: the code, once in the file.
        after: what stands there instead.
        breaks: what is then wrong.
        tests: arguments of pytest: the tests that should notice.
    """

    name: str
    file: str
    before: str
    after: str
    breaks: str
    tests: list[str]

    @property
    def room(self) -> str:
        """The part of the library that it is in."""
        parts = Path(self.file).parts
        return "methods/base" if parts[1:3] == ("methods", "base") else parts[1]

    def apply(self, text: str) -> str:
        """Return the file's text with the defect.

        Raises:
            ValueError: ``before`` is not there, or more than once.
        """
        if (found := text.count(self.before)) != 1:
            raise ValueError(f"{self.name}: what it replaces is {found} times in {self.file}, not once")
        return text.replace(self.before, self.after)


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant; ``killer`` is the test that failed, None where all passed."""

    name: str
    room: str
    breaks: str
    killer: str | None
    seconds: float


def mutants(table: Path = TABLE) -> list[Mutant]:
    """Read the list."""
    return [Mutant(**entry) for entry in tomllib.loads(table.read_text(encoding="utf-8"))["mutant"]]


@contextmanager
def copied(root: Path = ROOT) -> Iterator[Path]:
    """A copy of the tree that nobody else sees: the checkout is never touched."""
    with tempfile.TemporaryDirectory(prefix="mutants.") as folder:
        for name in COPIED:
            source, target = root / name, Path(folder, name)
            if source.is_dir():
                shutil.copytree(source, target)  # with times and __pycache__: nothing is compiled anew
            elif source.exists():
                shutil.copy2(source, target)
        yield Path(folder)


@contextmanager
def applied(mutant: Mutant, tree: Path) -> Iterator[None]:
    """Within the block the copy has the defect; afterwards not, whatever happened."""
    file = tree / mutant.file
    text, times = file.read_text(encoding="utf-8"), file.stat()
    broken = mutant.apply(text)
    try:
        file.write_text(broken, encoding="utf-8")
        yield
    finally:
        file.write_text(text, encoding="utf-8")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def run_tests(tree: Path, tests: Sequence[str], timeout: float = TIMEOUT) -> str | None:
    """Run tests in the tree up to the first failure, and return its name; None: all have passed.

    Raises:
        RuntimeError: nothing was run.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    paths = filter(None, (str(tree), os.environ.get("PYTHONPATH")))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"{timeout:.0f} s were not enough"
    if done.returncode == PASSED:
        return None
    if done.returncode not in (FAILED, INTERRUPTED):
        raise RuntimeError(f"pytest {' '.join(tests)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    red = RED.search(done.stdout)
    return red[1] if red else "an error outside of all tests"


def judge(mutant: Mutant, tree: Path, timeout: float = TIMEOUT) -> Verdict:
    """Put one mutant into the tree and run its tests."""
    start = time.monotonic()
    with applied(mutant, tree):
        killer = run_tests(tree, mutant.tests, timeout)
    return Verdict(mutant.name, mutant.room, mutant.breaks, killer, round(time.monotonic() - start, 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the mutants; 1 where one survived."""
    parser = argparse.ArgumentParser(description="deliberate defects, and the test that notices each")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of mutants, or of rooms such as layers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts there, one by one")
    given = parser.parse_args(arguments)
    known = mutants()
    if unknown := set(given.only or ()) - {name for m in known for name in (m.name, m.room)}:
        parser.error(f"no mutant or room is called {', '.join(sorted(unknown))}")
    chosen = [m for m in known if not given.only or {m.name, m.room} & set(given.only)]
    verdicts: list[Verdict] = []
    with copied() as tree:
        for mutant in chosen:
            verdicts.append(verdict := judge(mutant, tree))
            print(f"{verdict.seconds:6.1f} s  {mutant.name:32} {verdict.killer or 'SURVIVED'}", flush=True)
            if given.json:
                given.json.write_text(json.dumps([asdict(v) for v in verdicts], indent=1) + "\n")
        # A test that fails by itself kills nothing.
        killers = sorted({v.killer for v in verdicts if v.killer and v.killer.startswith("tests/")})
        false = run_tests(tree, killers, TIMEOUT + 10 * len(killers)) if killers else None
    survived = [v.name for v in verdicts if v.killer is None]
    print(f"{len(verdicts)} mutants, {len(verdicts) - len(survived)} killed; survived: {', '.join(survived) or 'none'}")
    if false:
        print(f"{false} fails without any mutant, too")
    return int(bool(survived or false))


if __name__ == "__main__":
    sys.exit(main())
