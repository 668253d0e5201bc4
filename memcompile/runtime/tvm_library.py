"""Open a library that TVM compiled, with TVM's runtime alone: neither the compiler nor the package `tvm`.

The package `tvm` imports its compiler (260 MB). An artifact needs `tvm_ffi` and two shared libraries of the
`apache-tvm` package, `libtvm_runtime` (tensors, threads) and `libtvm_runtime_extra` (Relax's virtual machine,
sorting), which are found beside the package and loaded without importing it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from memcompile.errors import MemcompileError

Array = NDArray[Any]
LIBRARIES: Final = ("libtvm_runtime", "libtvm_runtime_extra")
_SUFFIX: Final = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
_CPU: Final = 1  # kDLCPU
_POOLED: Final = 2  # freed tensors are kept for the next call
# path -> what it was when it was loaded: the system's loader gives the old library for a name it knows
_LOADED: dict[str, tuple[int, int, int]] = {}
_KEPT: list[Any] = []


@functools.cache
def runtime() -> Any:
    """`tvm_ffi`, with the libraries of TVM's runtime loaded. Raises ImportError where one is missing."""
    hidden = "torch" not in sys.modules
    if hidden:
        # tvm_ffi imports torch where it is installed, for a fault of Windows that does not concern it here
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tvm_ffi
    finally:
        if hidden:
            del sys.modules["torch"]
    spec = importlib.util.find_spec("tvm")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        raise ImportError("the package apache-tvm is not installed")
    for name in LIBRARIES:
        path = Path(places[0]) / "lib" / f"{name}{_SUFFIX}"
        if not path.is_file():
            raise ImportError(f"{path.name} is not among the libraries of apache-tvm")
        _KEPT.append(ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL))
    return tvm_ffi


def use_threads(threads: int) -> None:
    """How many threads TVM's kernels run on, in this process."""
    runtime().get_global_func("runtime.config_threadpool")(1, threads)


class TvmLibrary:
    """The functions of a compiled library, on the CPU."""

    def __init__(self, path: Path) -> None:
        """Raises MC505 when TVM's runtime does not load the file."""
        ffi = runtime()
        try:
            self._module = ffi.load_module(str(_loadable(path)))
            self._machine = self._module["vm_load_executable"]()
            self._machine["vm_initialization"](_CPU, 0, _POOLED)
        except Exception as error:
            raise MemcompileError(
                "MC505", f"TVM's runtime does not load {path.name}: {_first_line(error)}", where=str(path),
                fix="run it on the machine type it was made for, with the apache-tvm it was made with",
            ) from error  # fmt: skip
        self._tensor = ffi.from_dlpack

    def arity(self, function: str) -> int:
        """How many inputs a function takes. Raises MC505 when the library does not have it."""
        count = int(self._machine["get_function_arity"](function))
        if count < 0:
            raise MemcompileError(
                "MC505", f"the library has no function {function!r}",
                fix="copy the whole directory again, or make the artifact again",
            )  # fmt: skip
        return count

    def tensor(self, array: Array) -> Any:
        """The array as TVM's tensor, over the same memory."""
        return self._tensor(array)

    def call(self, function: str, inputs: Sequence[Any]) -> list[Any]:
        """Run a function over tensors; its outputs as tensors. Raises MC901 when it fails."""
        try:
            return list(self._machine[function](*inputs))
        except Exception as error:
            raise MemcompileError("MC901", f"TVM could not run {function}: {_first_line(error)}") from error


def to_numpy(tensor: Any) -> Array:
    """A tensor's memory as an array."""
    return np.from_dlpack(tensor)


def _loadable(path: Path) -> Path:
    """`path`, or a copy of it under a new name when another file of that name was loaded before."""
    status = path.stat()
    identity = (status.st_ino, status.st_mtime_ns, status.st_size)
    name = str(path.resolve())
    if _LOADED.setdefault(name, identity) == identity:
        return path
    folder = tempfile.TemporaryDirectory(prefix="memcompile-library-")
    _KEPT.append(folder)
    return Path(shutil.copy2(path, folder.name))


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
