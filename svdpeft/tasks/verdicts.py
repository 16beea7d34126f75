"""Whether two mathematical expressions are equal, by math-verify in a process of its own.

What a model writes can keep a computer algebra system busy for ever (9^9^9^9). math-verify's own limit is an alarm
signal, which only the main thread of a process can have and which does not interrupt a long computation in C. Here
the parent waits with a clock and ends the process; so it works in threads and in worker processes, too.

The file is its own child process: it imports nothing of this package and is run as text.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from threading import Timer

START_SECONDS = 120.0  # until the child is there: a busy machine imports slowly
ALARM = 5  # seconds that math-verify gives itself to read an expression, and to compare two
MEMORY = 4 << 30  # bytes of address space of the child, where the system knows such limits


def check() -> None:
    """Raise ImportError where math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError('the task "math" is judged by math-verify: pip install "svdpeft[math]"')


def equal(pairs: Sequence[tuple[str, str]], seconds: float = 30.0) -> list[bool]:
    r"""Judge pairs of a reference and an answer, both LaTeX without dollar signs.

    Args:
        pairs: (reference, answer); the order matters: math-verify reads the answer more kindly.
        seconds: a pair that takes longer, or breaks the process, is not equal.

    Raises:
        ImportError: math-verify is not installed.
        RuntimeError: the process does not start.

    Example:
        >>> equal([(r"\frac{1}{2}", "0.5"), (r"\frac{1}{2}", "2")])
        [True, False]
    """
    check()
    found: list[bool] = []
    while len(found) < len(pairs):
        found += _session(pairs[len(found) :], seconds)
    return found


def _session(pairs: Sequence[tuple[str, str]], seconds: float) -> list[bool]:
    """Verdicts up to and with the first pair that one process does not survive."""
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile("w+") as given,
        tempfile.TemporaryFile() as log,
    ):
        given.write("".join(f"{json.dumps(pair)}\n" for pair in pairs))
        given.seek(0)
        # from an empty folder: no file beside the caller can take the place of a module
        child = subprocess.Popen(
            [sys.executable, "-c", Path(__file__).read_text(encoding="utf-8")],
            stdin=given, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder,
        )  # fmt: skip

        def line(limit: float) -> str:
            clock = Timer(limit, child.kill)
            clock.start()
            try:
                return child.stdout.readline().strip()  # type: ignore[union-attr]
            finally:
                clock.cancel()

        found: list[bool] = []
        try:
            if line(START_SECONDS) != "ready":
                child.wait()
                log.seek(0)
                raise RuntimeError(f"math-verify did not start: {log.read().decode(errors='replace').strip()[-500:]}")
            for _ in pairs:
                found.append((said := line(seconds)) == "1")
                if not said:
                    break
        finally:
            child.kill()
            child.wait()
            child.stdout.close()  # type: ignore[union-attr]
        return found


def _child() -> None:
    import math_verify

    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):  # not everywhere is there such a limit
        pass
    answers = sys.stdout
    sys.stdout = sys.stderr  # nothing that a library prints is a verdict
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        reference, answer = (math_verify.parse(f"${text}$", parsing_timeout=ALARM) for text in json.loads(line))
        print(int(math_verify.verify(reference, answer, timeout_seconds=ALARM)), file=answers, flush=True)


if __name__ == "__main__":
    _child()
