"""Peak memory of a stretch of a program."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak_memory() -> int:
    """Start a new stretch: of the GPU where there is one, else of the process where the system allows it (Linux).

    Returns:
        Bytes that are in use now: what the stretch itself needs is ``peak_memory()`` less this.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if _CLEAR.exists():
        with contextlib.suppress(AttributeError):  # glibc's: what was freed goes back to the system
            ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")  # proc(5): resets VmHWM, the peak resident set size
    return peak_memory()


def peak_memory() -> int:
    """Return the largest memory use of this stretch in bytes: allocated on the GPU, else resident in the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Some kernels and containers have the file without the row.
    rows = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    if row := next((line for line in rows if line.startswith("VmHWM:")), None):
        return int(row.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
