"""The command line: one file per command. Heavy imports wait until a command runs."""

from svdpeft.cli import (
    check,
    combine,
    compare,
    decompose,
    evaluate,
    export,
    extract,
    import_,
    inspect,
    merge,
    methods,
    plan,
    report,
    train,
)
from svdpeft.cli.app import app

__all__ = [
    "app",
    "check",
    "combine",
    "compare",
    "decompose",
    "evaluate",
    "export",
    "extract",
    "import_",
    "inspect",
    "merge",
    "methods",
    "plan",
    "report",
    "train",
]
