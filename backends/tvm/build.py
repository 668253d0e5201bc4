"""Compile a Relax module into a shared library."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import tvm
from tvm.ir import IRModule

from memcompile.errors import MemcompileError

LIBRARY: Final = "model.so"


def cpu_target(threads: int = 0) -> Any:
    """This machine's processor as TVM's target; with `threads`, for that many of its cores."""
    target: dict[str, Any] = {"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()}
    if threads:
        target["num-cores"] = threads
    return tvm.target.Target(target)


def need_linker() -> None:
    """Raise MC115 where there is no C++ compiler, with which TVM links."""
    if shutil.which("g++") is None and shutil.which("clang++") is None and shutil.which("c++") is None:
        raise MemcompileError(
            "MC115",
            "there is no C++ compiler, with which TVM links what it compiled",
            fix="install g++ or clang++; running the artifact needs neither",
        )


def build(module: IRModule, target: Any, path: Path) -> None:
    """Compile `module` and write the library to `path`."""
    executable = tvm.compile(module, target=target)
    executable.export_library(str(path))
