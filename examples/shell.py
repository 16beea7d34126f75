"""What recipes share: a command, printed and run as a shell would."""

from __future__ import annotations

import shlex

from svdpeft.cli import app


def run(command: str) -> None:
    """Print and run one ``svdpeft`` command; its failure ends the recipe."""
    print(f"$ {command}")
    program, *words = shlex.split(command)
    assert program == "svdpeft"
    if code := app(words, standalone_mode=False):
        raise SystemExit(code)
