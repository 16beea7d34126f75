"""Peak memory of a stretch of a program."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak_memory() -> None:
    """Start a new stretch: of the GPU where there is one, else of the process where the system allows it (Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        _CLEAR.write_text("5")  # proc(5): resets VmHWM, the peak resident set size


def peak_memory() -> int:
    """Return the largest memory use of this stretch in bytes: allocated on the GPU, else resident in the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if _STATUS.exists():
        row = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(row.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
