"""The memory high-water mark of this process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path


def peak_memory_bytes() -> int:
    """Return the most physical memory this process has held.

    VmHWM where /proc has it: it starts afresh in a new program, while ru_maxrss is inherited from the parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def forget_peak_memory() -> None:
    """Start the high-water mark again from what is held now, where the system allows it.

    For models whose loading passes through a copy that has nothing to do with running them.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
