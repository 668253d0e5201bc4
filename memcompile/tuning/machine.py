"""What a measurement depends on beside the sizes: the machine, and the versions of what ran."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from memcompile.kernels import find_library, library_path

KERNELS: Final = "kernels"


def fingerprint(threads: int) -> dict[str, str | int]:
    """The CPU's model, its usable cores, the kernels' instruction set, and the threads that are used."""
    return {"cpu": cpu_model(), "cores": usable_cores(), "isa": _instruction_set(), "threads": threads}


@functools.cache
def cpu_model() -> str:
    """The CPU's name as the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    return next(names, platform.machine())


def usable_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def versions(names: Sequence[str]) -> dict[str, str]:
    """The versions of packages, and for "kernels" the digest of the kernel library's sources.

    What is not installed has the version "none".
    """
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    if name == KERNELS:
        return library_path().stem.rpartition("-")[2]
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _instruction_set() -> str:
    library = find_library()
    return "none" if library is None else library.isa
