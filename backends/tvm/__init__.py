"""The TVM target: programs as one compiled library, with kernels of our own in TVMScript."""

from __future__ import annotations

from memcompile.backends.tvm.backend import TvmBackend

__all__ = ["TvmBackend"]
