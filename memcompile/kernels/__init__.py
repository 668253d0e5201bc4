"""Attention and linear layers on the CPU: one library that torch, ONNX Runtime and TVM call."""

from __future__ import annotations

from memcompile.kernels.build import BuildError, build, library_path
from memcompile.kernels.library import (
    MAX_HEAD_WIDTH,
    TYPES,
    CAppend,
    CAttention,
    CFfn,
    CLinear,
    CTensor,
    KernelLibrary,
    find_library,
    open_library,
)

__all__ = [
    "MAX_HEAD_WIDTH",
    "TYPES",
    "BuildError",
    "CAppend",
    "CAttention",
    "CFfn",
    "CLinear",
    "CTensor",
    "KernelLibrary",
    "build",
    "find_library",
    "library_path",
    "open_library",
]
