"""Where and with what a run was done."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import svdpeft

PACKAGES = (
    *("torchvision", "transformers", "timm", "accelerate", "safetensors", "tokenizers", "numpy"),
    *("datasets", "math-verify", "vllm", "rwkv7-hf", "ray"),  # extras, where they are installed
)


def provenance() -> dict[str, Any]:
    """Return what a reader needs to run it again: revision, versions, machine."""
    return {
        "svdpeft": svdpeft.__version__,
        "git": _git(),
        "python": platform.python_version(),
        "versions": dict(_versions()),
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
        },
    }


def _versions() -> Iterator[tuple[str, str]]:
    yield "torch", torch.__version__
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            yield name, version(name)


def _processor() -> str:
    """Name and number of the processors."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _git() -> dict[str, Any] | None:
    """Revision and dirty flag of the source tree; ``None`` where svdpeft is installed from a wheel."""
    root = Path(svdpeft.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        ask = ["git", "-C", str(root)]
        revision = subprocess.run(
            [*ask, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        status = subprocess.run(
            [*ask, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"revision": revision, "dirty": bool(status.strip())}
