"""Compile a Relax module into a shared library; for CUDA, also its kernels as source and as machine code."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import tvm
from tvm.ir import IRModule

from memcompile.errors import MemcompileError

LIBRARY: Final = "model.so"
CUDA_SOURCE: Final = "kernels.cu"
CUDA_ARCHITECTURE: Final = "sm_80"
# limits that every GPU since sm_50 has
_CUDA_LIMITS: Final = {
    "max_threads_per_block": 1024,
    "max_shared_memory_per_block": 49152,
    "thread_warp_size": 32,
}


def cpu_target(threads: int = 0) -> Any:
    """This machine's processor as TVM's target; with `threads`, for that many of its cores."""
    target: dict[str, Any] = {"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()}
    if threads:
        target["num-cores"] = threads
    return tvm.target.Target(target)


def cuda_target(architecture: str = CUDA_ARCHITECTURE) -> Any:
    """A GPU of an architecture as TVM's target; the GPU itself is not needed."""
    return tvm.target.Target({"kind": "cuda", "arch": architecture, **_CUDA_LIMITS}, host=cpu_target())


def need_linker() -> None:
    """Raise MC115 where there is no C++ compiler, with which TVM links."""
    if shutil.which("g++") is None and shutil.which("clang++") is None and shutil.which("c++") is None:
        raise MemcompileError(
            "MC115",
            "there is no C++ compiler, with which TVM links what it compiled",
            fix="install g++ or clang++; running the artifact needs neither",
        )


def build(module: IRModule, path: Path, *, device: str, kernels: Path | None = None) -> tuple[str, ...]:
    """Compile `module`, write the library to `path` and, for CUDA, the source beside it; gives the names.

    `kernels`: the kernel library as an object file, linked into the library.
    """
    executable = tvm.compile(module, target=cuda_target() if device == "cuda" else cpu_target())
    # what is linked in serves this library alone, whatever else the process has loaded
    linked = {"addons": [str(kernels)], "options": ["-pthread", "-Wl,-Bsymbolic"]} if kernels else {}
    executable.export_library(str(path), **linked)
    if device != "cuda":
        return (path.name,)
    (path.parent / CUDA_SOURCE).write_text(cuda_source(executable), encoding="utf-8")
    return path.name, CUDA_SOURCE


def cuda_source(executable: Any) -> str:
    """The CUDA source of all kernels of an executable."""
    found = [executable.mod]
    for module in found:
        if module.kind == "cuda":
            return str(module.inspect_source("cuda"))
        found.extend(module.imports_)
    raise MemcompileError("MC901", "the compiled module has no CUDA kernels", where="backends/tvm/build.py")


def find_nvcc() -> str | None:
    """NVIDIA's compiler: on the PATH, in CUDA_HOME, or in /usr/local/cuda."""
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *map(str, Path("/usr/local").glob("cuda-*"))]
    return shutil.which("nvcc") or next(
        (nvcc for place in places if place and (nvcc := shutil.which("nvcc", path=f"{place}/bin"))), None
    )


def compile_cubin(source: Path, cubin: Path, *, architecture: str = CUDA_ARCHITECTURE) -> None:
    """Compile CUDA source to machine code of one architecture; no GPU is needed.

    Raises MC115 where nvcc is missing, MC901 when it refuses the source.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise MemcompileError(
            "MC115",
            "nvcc, NVIDIA's compiler, was not found",
            fix="install the CUDA toolkit or set CUDA_HOME",
        )
    # generated code names values that it then does not use
    command = [nvcc, f"-arch={architecture}", "-cubin", "-w", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MemcompileError("MC901", f"nvcc refuses the kernels: {done.stderr.strip()}", where=str(source))
