"""The command line: one file per command. Heavy imports wait until a command runs."""

from svdpeft.cli import compare, decompose, evaluate, extract, inspect, merge, methods, report, train
from svdpeft.cli.app import app

__all__ = ["app", "compare", "decompose", "evaluate", "extract", "inspect", "merge", "methods", "report", "train"]
