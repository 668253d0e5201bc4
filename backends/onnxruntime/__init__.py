"""The ONNX Runtime target (CPU and CUDA)."""

from __future__ import annotations

from memcompile.backends.onnxruntime.backend import OnnxRuntimeBackend

__all__ = ["OnnxRuntimeBackend"]
