"""What is marked ``apart`` runs in a process of its own, and all that becomes of it is told here."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]


def test_what_runs_apart_is_told(pytester: pytest.Pytester):
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makepyfile(
        textwrap.dedent(
            f"""
            import os, signal, warnings
            import pytest

            pytestmark = pytest.mark.apart

            def test_passes(tmp_path):
                assert os.getpid() != {os.getpid()}
                assert tmp_path.is_dir()

            def test_fails():
                assert "one" == "other"

            def test_skips():
                pytest.skip("for a reason")

            def test_warns():
                warnings.warn("loudly")

            def test_dies():
                os.kill(os.getpid(), signal.SIGKILL)
            """
        )
    )
    result = pytester.runpytest_inprocess("-W", "error", "-p", "no:cacheprovider", "-rs")
    result.assert_outcomes(passed=1, failed=3, skipped=1)
    result.stdout.fnmatch_lines_random(
        [
            "*assert 'one' == 'other'*",
            "*SKIPPED*for a reason*",
            "*UserWarning: loudly*",
            "*the process apart ended with -9*",
        ]
    )
