"""What a shell completes: names of methods, tasks and models, found without importing torch."""

from __future__ import annotations

from svdpeft.registry import METHODS, TASKS

MODELS = ("dinov2-vits14", "efficientnet-lite0", "minilm-l6", "smollm2-135m", "hf:", "timm:")  # else a file or a folder


def method_names(incomplete: str) -> list[str]:
    """The methods that begin so."""
    return [name for name in METHODS.offered() if name.startswith(incomplete)]


def method_lists(incomplete: str) -> list[str]:
    """The same for the last of several methods with commas between them."""
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in method_names(last)]


def task_names(incomplete: str) -> list[str]:
    """The tasks that begin so."""
    return [name for name in TASKS.offered() if name.startswith(incomplete)]


def model_names(incomplete: str) -> list[str]:
    """The embedded models that begin so; where none does, the shell takes files and folders."""
    return [name for name in MODELS if name.startswith(incomplete)]
