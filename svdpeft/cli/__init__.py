"""The command line: one file per command. Heavy imports wait until a command runs."""

from svdpeft.cli import compare, evaluate, inspect, methods, report, train
from svdpeft.cli.app import app

__all__ = ["app", "compare", "evaluate", "inspect", "methods", "report", "train"]
