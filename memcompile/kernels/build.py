"""Build the kernel library with the system's C++ compiler, once per version of its sources.

The library holds every instruction set that the compiler knows; which one runs is chosen when it is loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).resolve().parent / "csrc"
# each instruction set is the same source with its own flags and namespace
INSTRUCTION_SETS: Final = {
    "avx2": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "avx512bf16": ("-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16", "-mavx512vnni"),
}
# compiled only where the processor has it
AMX: Final = (*INSTRUCTION_SETS["avx512bf16"], "-mamx-tile", "-mamx-bf16", "-DMC_AMX")
# compiled once an instruction set, and once
KERNEL_SOURCES: Final = ("kernels", "linear", "ffn")
COMMON_SOURCES: Final = ("library", "tvm", "onnxruntime", "onnxruntime_linear", "onnxruntime_ffn")
FLAGS: Final = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fvisibility=hidden", "-pthread")
COMPILE_SECONDS: Final = 300
# what the user adds to FLAGS, as to any C++ build
FLAGS_VARIABLE: Final = "CXXFLAGS"
# overrides where built libraries are kept
CACHE_VARIABLE: Final = "MEMCOMPILE_CACHE"


class BuildError(Exception):
    """The library cannot be built here; the message says why."""


def cache_folder() -> Path:
    """Where built libraries are kept: $MEMCOMPILE_CACHE, else the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memcompile"


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, else g++, c++ or clang++ on the path."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def library_path() -> Path:
    """Where the library of these sources is, or will be."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    digest.update(repr((instruction_sets(), _flags(), KERNEL_SOURCES, COMMON_SOURCES)).encode())
    return cache_folder() / "kernels" / f"libmemcompile_kernels-{digest.hexdigest()[:16]}.so"


def _flags() -> tuple[str, ...]:
    return (*FLAGS, *shlex.split(os.environ.get(FLAGS_VARIABLE, "")))


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """The flags of what is compiled here, by name; "amx" on processors that have it."""
    try:
        found = "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        found = False
    return {**INSTRUCTION_SETS, "amx": AMX} if found else INSTRUCTION_SETS


def build_object() -> Path:
    """The kernels as one object file, to be linked into another library. Raises BuildError."""
    return build().with_suffix(".o")


def build() -> Path:
    """The library's path, built first when it is not there. Raises BuildError."""
    path = library_path()
    if path.exists():
        return path
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64"):
        raise BuildError(f"there are kernels for x86-64 only, this is {machine}")
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("there is no C++ compiler (g++ or clang++, or the one that $CXX names)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        folder, sets = Path(name), instruction_sets()
        with_amx = ["-DMC_WITH_AMX"] if "amx" in sets else []
        jobs = [
            [
                *_flags(),
                *flags,
                f"-DMC_ISA={isa}",
                "-c",
                str(SOURCES / f"{source}.cpp"),
                "-o",
                str(folder / f"{source}_{isa}.o"),
            ]
            for isa, flags in sets.items()
            for source in KERNEL_SOURCES
        ]
        jobs += [
            [*_flags(), *with_amx, "-c", str(SOURCES / f"{source}.cpp"), "-o", str(folder / f"{source}.o")]
            for source in COMMON_SOURCES
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: _run([compiler, *job]), jobs))
        objects = [job[-1] for job in jobs]
        _run([compiler, "-shared", *_flags(), *objects, "-o", str(folder / path.name)])
        linked = path.with_suffix(".o")
        own = [path for path in objects if "onnxruntime" not in Path(path).name]
        _run([compiler, "-r", "-nostdlib", *own, "-o", str(folder / linked.name)])
        # two processes may build at once: the last rename wins, both libraries are the same
        (folder / linked.name).replace(linked)
        (folder / path.name).replace(path)
    return path


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command[:1])} failed:\n{done.stderr[-2000:]}")
